"""The generative networks of examples/models: the VAE's samples, and DRAW against the paper's equations in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from example_cases import MODELS, changed, outputs
from graph_cases import EXACT
from torch import Tensor

from reparam.graph import load_architecture


def test_the_vae_samples_where_its_noise_says() -> None:
    """Noise e gives what the decoder makes of mean + e·deviation; zero noise the mean's image."""
    model = changed(load_architecture(str(MODELS / "conv_vae.py:conv_vae"))).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, 32, dtype=torch.float64, generator=generator)
    logits, mean, log_variance = outputs(model, [x, noise])
    decode: Callable[[Tensor], Tensor] = model.decode  # type: ignore[assignment]
    deviation = log_variance.exp().sqrt()
    torch.testing.assert_close(logits, decode(mean + deviation * noise), rtol=EXACT, atol=EXACT)
    at_mean, *_ = outputs(model, [x, torch.zeros_like(noise)])
    assert torch.equal(at_mean, decode(mean))
    assert not torch.allclose(at_mean, logits)


def window_by_the_paper(head: np.ndarray, window: int, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Gregor et al., eq. 19-26, one scalar after the other: F_Y, F_X (window, size) and the gain of one image."""
    gx, gy, log_variance, log_stride, log_gain = head
    gx, gy = (size + 1) / 2 * (gx + 1), (size + 1) / 2 * (gy + 1)
    stride = (size - 1) / (window - 1) * np.exp(log_stride)
    filters = np.zeros((2, window, size))
    for which, centre in enumerate((gy, gx)):
        for i in range(1, window + 1):
            mean = centre + (i - window / 2 - 0.5) * stride
            for a in range(1, size + 1):
                filters[which, i - 1, a - 1] = np.exp(-((a - mean) ** 2) / (2 * np.exp(log_variance)))
            filters[which, i - 1] /= filters[which, i - 1].sum()
    return filters[0], filters[1], float(np.exp(log_gain))


@torch.no_grad()
def test_draw_computes_the_papers_equations() -> None:
    """Two steps of two images against eq. 3-8 and 19-29 written out in numpy; float64."""
    size, code, steps = 9, 4, 2
    args = {"channels": "1", "size": str(size), "steps": str(steps), "hidden": "6", "code": str(code)}
    model = load_architecture(str(MODELS / "draw.py:draw"), args | {"read": "2", "write": "3"})
    model = changed(model).double().eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 1, size, size, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, steps, code, dtype=torch.float64, generator=generator)
    found = outputs(model, [x, noise])
    w = {key: value.numpy() for key, value in model.state_dict().items()}

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return np.asarray(w[f"{name}.weight"] @ v + w[f"{name}.bias"])

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-v)))

    def lstm_step(name: str, v: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gates = (
            w[f"{name}.weight_ih"] @ v
            + w[f"{name}.bias_ih"]
            + w[f"{name}.weight_hh"] @ h
            + w[f"{name}.bias_hh"]
        )
        enter, forget, new, out = np.split(gates, 4)
        c = sigmoid(forget) * c + sigmoid(enter) * np.tanh(new)
        return sigmoid(out) * np.tanh(c), c

    for item in range(2):
        image = x[item, 0].numpy()
        canvas = np.zeros((size, size))
        eh = ec = dh = dc = np.zeros(6)
        for step in range(steps):
            error = image - sigmoid(canvas)
            fy, fx, gain = window_by_the_paper(linear("read_window.placement", dh), 2, size)
            glimpse = gain * np.concatenate([(fy @ image @ fx.T).ravel(), (fy @ error @ fx.T).ravel()])
            eh, ec = lstm_step("encoder", np.concatenate([glimpse, dh]), eh, ec)
            mean, log_deviation = linear("mean", eh), linear("log_deviation", eh)
            dh, dc = lstm_step("decoder", mean + np.exp(log_deviation) * noise[item, step].numpy(), dh, dc)
            fy, fx, gain = window_by_the_paper(linear("write_window.placement", dh), 3, size)
            canvas = canvas + fy.T @ linear("patch", dh).reshape(3, 3) @ fx / gain
            np.testing.assert_allclose(found[1][item, step], mean, rtol=EXACT, atol=EXACT)
            np.testing.assert_allclose(found[2][item, step], log_deviation, rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(found[0][item, 0], canvas, rtol=EXACT, atol=EXACT)


@torch.no_grad()
def test_a_draw_window_far_outside_the_image_stays_finite() -> None:
    model = load_architecture(str(MODELS / "draw.py:draw"), {"steps": "1"})
    model.get_submodule("read_window.placement").bias.copy_(torch.tensor([50.0, 50.0, -5.0, 0.0, 0.0]))  # type: ignore[operator]
    out = outputs(model, [torch.rand(1, 1, 28, 28), torch.zeros(1, 1, 100)])
    assert all(bool(tensor.isfinite().all()) for tensor in out)
