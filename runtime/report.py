"""The HTML report of a comparison: one file, pictures inside."""

from __future__ import annotations

import base64
import html
import math

import numpy as np

from svdit.plans.bundle import Bundle
from svdit.runtime.compare import Comparison
from svdit.runtime.video import contact_sheet, png_bytes

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #d0d7de;padding:.3rem .7rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}th{background:#f6f8fa}img{width:100%;image-rendering:pixelated}
figure{margin:0}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
@media(max-width:60rem){.pair{grid-template-columns:1fr}}figcaption{color:#57606a}
"""


def html_report(found: Comparison, bundle: Bundle) -> str:
    """A self-contained page: figures, contact sheets side by side, errors of single outputs."""
    figures = found.figures()
    rows = [
        (
            "bundle",
            f"{bundle.path.name} ({bundle.manifest.model}, {bundle.manifest.variant}, {bundle.manifest.precision})",
        ),
        ("compared", found.runner),
        ("reference", found.against),
        ("steps", str(found.compared.steps)),
        ("guidance", f"{found.compared.guidance:g}"),
        ("PSNR, mean", _decibel(float(np.mean([s.psnr for s in found.scores])))),
        ("SSIM, mean", f"{figures['ssim']:.4f}"),
        ("density of attention", f"{found.density:.4f}"),
        ("FLOP ratio", f"{found.flops_ratio:.3f}"),
        ("step, reference", f"{figures['against_latency_ms']:.1f} ms"),
        ("step, compared", f"{figures['latency_ms']:.1f} ms"),
        ("speed-up, whole loop", f"{found.speedup:.3f}x"),
        ("final latents, relative L2 error", f"{found.latents_rel_l2:.3e}"),
    ]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(bundle.path.name)} against {html.escape(found.against)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(bundle.path.name)} against {html.escape(found.against)}</h1>",
        _table(["", ""], rows),
        "<h2>Videos</h2>",
    ]
    for i, score in enumerate(found.scores):
        parts.append(
            f"<h3>{html.escape(score.prompt)}</h3><p>seed {score.seed}, PSNR {_decibel(score.psnr)}, "
            f"SSIM {score.ssim:.4f}</p><div class=pair>"
        )
        parts += [
            _figure(found.reference.videos[i], "reference"),
            _figure(found.compared.videos[i], "compared"),
            "</div>",
        ]
    parts.append("<h2>Single denoiser outputs on the same inputs</h2>")
    parts.append(
        _table(
            ["output", "step", "stage", "max. absolute error", "relative L2 error"],
            [
                (e.output, str(e.step), str(e.stage), f"{e.max_abs_error:.3e}", f"{e.rel_l2_error:.3e}")
                for e in found.outputs
            ],
        )
    )
    return "\n".join(parts) + "\n"


def _decibel(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.2f} dB"


def _figure(video: np.ndarray, caption: str) -> str:
    picture = base64.b64encode(png_bytes(contact_sheet(video))).decode("ascii")
    return (
        f"<figure><img alt='{caption} frames' src='data:image/png;base64,{picture}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>" if top else f"<table>{body}</table>"
