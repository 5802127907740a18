"""The table of llama.py's rows."""

from __future__ import annotations

from tables import where


def named(row: dict) -> str:
    """The model, and how much of it was measured."""
    layers, whole = row["shape"]["num_hidden_layers"], row["layers_of_model"]
    return row["model"] + (f", {layers} of {whole} layers" if layers < whole else "")


def line(row: dict) -> str:
    return (
        f"{row['name']:16} decode {1 / row['decode_seconds']:9.1f} tokens/s {row['decode_ratio']:5.2f}x, "
        f"prefill {row['prefill_seconds'] * 1e3:9.2f} ms {row['prefill_ratio']:5.2f}x, "
        f"weights {row['weight_bytes'] / 1e6:9.1f} MB"
    )


def _kernels(row: dict) -> str:
    return ", ".join(" + ".join(names) for names in row["kernels"].values() if names) or "–"


def table(rows: list[dict]) -> list[str]:
    """Everyone's decode and prefill with ratios to the first, and memory."""
    first = rows[0]
    where_it_ran = ", ".join(first["machine"]["gpus"]) if first["device"] == "cuda" else "without a GPU"
    how = "CUDA graphs" if first["graphs"] else "no CUDA graphs"
    lines = [
        f"{named(first)}, random weights, batch 1, static cache, {how} ({where_it_ran}, {where(first)}): prefill of "
        f"{first['prefill_tokens']} tokens, decode of {first['decode_tokens']} after them; times faster than "
        f"{first['name']}, median of pairs. Weights: with embeddings and head in bf16. At most: with a prefill.",
        "",
        "| | kernels (prefill, decode) | decode tokens/s | × | prefill ms | × | weights MB | at most MB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        most = "–" if row["most_bytes"] is None else f"{row['most_bytes'] / 1e6:,.1f}"
        decode = f"{1 / row['decode_seconds']:,.1f} | {row['decode_ratio']:.2f}"
        prefill = f"{row['prefill_seconds'] * 1e3:,.2f} | {row['prefill_ratio']:.2f}"
        weights = f"{row['weight_bytes'] / 1e6:,.1f}"
        lines.append(f"| {row['name']} | {_kernels(row)} | {decode} | {prefill} | {weights} | {most} |")
    return lines
