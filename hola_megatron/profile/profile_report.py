"""The report of tools/profile.py, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hola_megatron.log.console import short


def report(numbers: dict[str, Any]) -> str:
    """Speed, memory by phase, time by part, and what took longest."""
    n = numbers
    rates = [f"{short(n['tokens_per_second'])} tok/s", f"{n['ms_per_step']:.1f} ms a step"]
    if "mfu" in n:
        rates += [f"MFU {100 * n['mfu']:.1f}%", f"HFU {100 * n['hfu']:.1f}% of {n['peak_tflops']:.0f} TFLOP/s"]
    rates += [f"peak {n['memory_gb']:.1f} GB", f"first step {n['first_step_s']:.1f} s"]
    return "\n".join([
        f"{n['recipe']} on {n['ranks']} x {n['device']}; {n['code']}, torch {n['torch']}",
        f"{n['micro_batches']} micro-batches of {n['micro_batch_size']} x {n['sequence_length']} {n['data']} tokens; "
        f"{n['layout']}, recompute {n['recompute']}",
        " | ".join(rates), "", *_memory(n), *(["", *_share(n), "", *_kernels(n)] if "share" in n else [])])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; every column but the first is numbers."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows)]


def _memory(n: dict[str, Any]) -> list[str]:
    if n["memory"] is None:
        return ["Memory by phase: not measured, no CUDA device (the peak above is this process's)."]
    rows = [(name, f"{gb:.2f}") for name, gb in n["memory"].items()]
    return table(("memory, the largest of all ranks", "GB"), rows)


def _share(n: dict[str, Any]) -> list[str]:
    total = sum(n["share"].values())
    rows = [(part, f"{ms:.2f}", f"{100 * ms / total:.1f}") for part, ms in n["share"].items()]
    lines = table(("part of a step, rank 0", "ms", "%"), rows)
    if n["hidden_communication_ms"]:
        lines += ["", f"Not included: {n['hidden_communication_ms']:.2f} ms of communication that overlaps with other "
                  "work."]
    if "stretched" in n:
        lines += ["", f"Without the profiler the device's work took {n['stretched']:.3f} times as long as with it: the "
                  "parts are without, the list below is with it."]
    if n["cuda_graph"]:
        lines += ["", "Shares and the list below are of a step without its CUDA graph, stretched to the time with it."]
        if n["ranks"] > 1:
            lines[-1] += (" Communication there includes waiting for ranks that launch later, which a graph does not "
                          "do: its share may be too large.")
    if "data_wait_ms" not in n:
        lines += ["", "Data wait: not measured (synthetic tokens; --data reads the recipe's)."]
    return lines


def _kernels(n: dict[str, Any]) -> list[str]:
    rows = [(k["name"][:70].replace("|", "/"), k["part"], f"{k['ms']:.2f}", str(k["calls"])) for k in n["kernels"]]
    return table(("what took longest", "part", "ms", "calls"), rows)
