"""An ONNX file's weights: which state_dict key each initializer holds, and its values in bounded memory."""
