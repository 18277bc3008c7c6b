"""The hyperspherical map between rows of weights and angles, forward and backward."""
