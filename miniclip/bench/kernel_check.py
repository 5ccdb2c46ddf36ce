"""Check every kernel against float64 on this machine's GPU, and time it and whole models beside PyTorch and the peers.

    python -m miniclip.kernels.check             on a GPU, within eight minutes, the most valuable figures first
    python -m miniclip.kernels.check --dry       without a GPU: every stage but no clocks, in Triton's interpreter
    python -m miniclip.kernels.check --json      the same as one JSON object at the end

Each figure is printed when it is found, and with --out written to a file as a line of JSON, so that a run that is
stopped keeps its results. The last row has the rules for `miniclip.kernels.dispatch`. The exit status is 1 if an error
is over its tolerance or could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

COMPILERS = 12  # processes that compile kernels at once, before anything is timed
COMPILE_SECONDS = 90
STARTING, GRACE = 90, 45  # seconds for a process to begin, and for a stage to end after its time
PROCESS = [sys.executable, "-m", "miniclip.bench.kernel_check"]


class Stage(NamedTuple):
    name: str
    seconds: float  # it is stopped after this long
    rows: Callable[[torch.device, bool], Iterator[dict]]


def stages() -> list[Stage]:
    """The most valuable first."""
    from miniclip.bench import kernel_errors, kernel_models, kernel_times

    def timed(contests: Callable) -> Callable:
        return partial(kernel_times.times, contests)

    return [
        Stage("ceilings", 20, kernel_times.ceilings),
        Stage("errors", 60, kernel_errors.check),
        Stage("row kernels", 40, timed(kernel_times.row_contests)),
        Stage("ViT-B/32", 80, partial(kernel_models.models, "ViT-B/32")),
        Stage("attention", 100, timed(kernel_times.attention_contests)),
        Stage("packed text", 30, timed(kernel_times.packed_contests)),
        Stage("similarity", 40, timed(kernel_times.similarity_contests)),
        Stage("loss", 30, timed(kernel_times.loss_contests)),
        Stage("ViT-L/14", 60, partial(kernel_models.models, "ViT-L/14")),
        Stage("RN50", 30, partial(kernel_models.models, "RN50", peers=False)),
        Stage("compiled", 90, partial(kernel_models.compiled, "ViT-B/32")),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m miniclip.kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="without a GPU and without clocks, in Triton's interpreter")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append each figure to this file as a line of JSON")
    parser.add_argument("--stages", type=lambda text: text.split(","), metavar="NAMES", help="some, comma-separated")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after this long (default: 8)")
    parser.add_argument("--compile", metavar="SHARE", help=argparse.SUPPRESS)  # "3/12": what one compiling process does
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # what the process of `supervised` does
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        from miniclip.kernels import interpreter  # noqa: F401
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use; --dry checks the kernels' results without one")
    device = torch.device("cpu" if options.dry else "cuda")
    if options.compile:
        compile_share(*map(int, options.compile.split("/")), device, options.dry)
        return 0
    wanted = [stage for stage in stages() if not options.stages or stage.name in options.stages]
    if not wanted:
        parser.error(f"--stages is {','.join(options.stages)}; expected some of {', '.join(s.name for s in stages())}")
    if options.work:
        with contextlib.redirect_stdout(sys.stderr):  # what other packages print is no row
            for row in work(wanted, device, options.dry, time.monotonic() + 60 * options.minutes):
                print(json.dumps(row), file=sys.__stdout__, flush=True)
        return 0
    rows = list(measure(wanted, device, options))
    failed = sum(not row.get("ok", True) for row in rows)
    if options.json:
        print(json.dumps({"interpreted": options.dry, "rows": rows}))
    return int(failed > 0)


def measure(wanted: list[Stage], device: torch.device, options: argparse.Namespace) -> Iterator[dict]:
    """Run the stages; each row is reported as soon as it is known."""
    end = time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(options.out.open("a", encoding="utf-8", buffering=1)) if options.out else None

        def report(row: dict) -> dict:
            if file:
                file.write(json.dumps(row) + "\n")
            if not options.json:
                print(as_text(row), flush=True)
            return row

        yield report({"stage": "machine", **machine(options.dry)})
        compile_all(device, options.dry)
        found = []
        for row in work(wanted, device, True, end) if options.dry else supervised(wanted, end):
            if "begin" not in row:
                found.append(report(row))
                yield row
        yield report({"stage": "summary", **summary(found, device)})


def supervised(wanted: list[Stage], end: float) -> Iterator[dict]:
    """The rows of `work`, done by another process. A kernel that reads past its memory makes the GPU useless to its
    process, and one may hang: then the stage is given up, and a new process does the stages after it."""
    left = list(wanted)
    while left:
        names, minutes = ",".join(stage.name for stage in left), (end - time.monotonic()) / 60
        command = [*PROCESS, "--work", "--stages", names, "--minutes", str(minutes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            killer = _kill_after(STARTING, process)
            for line in process.stdout:
                row = json.loads(line)
                yield row
                if "begin" in row:
                    killer.cancel()
                    left = left[[stage.name for stage in left].index(row["begin"]) :]
                    seconds = min(left[0].seconds, max(0, end - time.monotonic()))
                    killer = _kill_after(seconds + GRACE, process)
            process.wait()
            killer.cancel()
        if process.returncode == 0:
            return
        name, left = left[0].name, left[1:]
        yield {"stage": name, "operation": name, "who": "stopped", "failed": f"its process: {process.returncode}"}


def _kill_after(seconds: float, process: subprocess.Popen) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def work(wanted: list[Stage], device: torch.device, dry: bool, end: float) -> Iterator[dict]:
    """The rows of the stages, and before those of each one that says that it begins."""
    for stage in wanted:
        yield {"begin": stage.name}
        for row in run_stage(stage, device, dry, end):
            yield {"stage": stage.name, **row}
        if not dry:
            torch.cuda.synchronize()  # an error, if this process can't use the GPU any more
            torch.cuda.empty_cache()


def run_stage(stage: Stage, device: torch.device, dry: bool, end: float) -> Iterator[dict]:
    """A stage's rows as far as its time allows. What goes wrong is a row too, and the next stage begins."""
    deadline = min(end, time.monotonic() + stage.seconds)
    try:
        rows = stage.rows(device, dry)
        while time.monotonic() < deadline or dry:
            row = next(rows, None)
            if row is None:
                break
            yield row
        else:
            yield {"operation": stage.name, "who": "no time left"}
    except Exception as fault:
        if dry:  # there it is a fault of this code
            raise
        yield {"operation": stage.name, "who": "stopped", "failed": f"{type(fault).__name__}: {fault}"[:300]}


def machine(dry: bool) -> dict:
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
    if dry:
        found["note"] = "interpreted, and every time is made up"
    else:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "processors": properties.multi_processor_count}
        found |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    return found


def compile_all(device: torch.device, dry: bool) -> None:
    """Compile every kernel that is timed, in processes that run at once, into Triton's cache."""
    if dry:
        compile_share(0, 8, device, dry)
        return
    shares = [f"{i}/{COMPILERS}" for i in range(COMPILERS)]
    running = [subprocess.Popen([*PROCESS, "--compile", share], stdout=subprocess.DEVNULL) for share in shares]
    end = time.monotonic() + COMPILE_SECONDS
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def compile_share(share: int, of: int, device: torch.device, dry: bool) -> None:
    """Call each `of`-th kernel once, with the inputs that it is checked or timed with."""
    for i, call in enumerate(kernel_calls(device, dry)):
        if i % of == share:
            with contextlib.suppress(Exception):  # it fails again, and is reported, where it is checked or timed
                call()


def kernel_calls(device: torch.device, dry: bool) -> Iterator[Callable]:
    from miniclip.bench import kernel_errors, kernel_times

    def call(contest: kernel_times.Contest, rival: kernel_times.Rival) -> None:
        with rival.context():
            rival.call(*contest.make())

    for case in kernel_errors.cases(device, dry):
        yield case.kernel
    for kind in ("row", "attention", "packed", "similarity", "loss"):
        for contest in getattr(kernel_times, f"{kind}_contests")(device, dry):
            yield from (partial(call, contest, rival) for rival in contest.rivals if rival.name.startswith("kernel"))


def summary(rows: list[dict], device: torch.device) -> dict:
    """How many errors were checked, how many are too large or failed, and the rules that follow from the times."""
    from miniclip.bench.kernel_rules import as_python, rules
    from miniclip.kernels.tiles import architecture

    errors = [row for row in rows if "ok" in row]
    found = machine(device.type == "cpu")
    source = f"{found.get('device', 'interpreted')}, {found['date']}, torch {found['torch']}, triton {found['triton']}"
    return {
        "errors": len(errors),
        "wrong": sum(not row["ok"] for row in errors),
        "rules": as_python(architecture(device), rules(rows, source)),
    }


def as_text(row: dict) -> str:
    """A row for people: microseconds, MiB, errors beside their tolerance."""
    if row["stage"] == "machine":
        return ", ".join(f"{key} {value}" for key, value in row.items() if key != "stage")
    if row["stage"] == "summary":
        return f"\n{row['wrong']} of {row['errors']} errors are over their tolerance, or failed\n\n{row['rules']}"
    name = f"{row['operation']:22} {row.get('dtype', ''):9} {row.get('shape', ''):26} {row.get('who', ''):46}"
    if "kernel" in row:
        verdict = "" if row["ok"] else "  TOO LARGE"
        return f"{name} {row['kernel']:10.1e} of {row['tolerance']:.1e}, PyTorch {row['pytorch']:.1e}{verdict}"
    clocks = [f"{key} {1e6 * row[key]:.1f} us" for key in ("eager", "graph", "latency") if key in row]
    if "peak_bytes" in row:
        clocks.append(f"peak {row['peak_bytes'] / 2**20:.1f} MiB")
    rest = ("copy_bytes", "float16_flops", "bfloat16_flops", "cosine", "first_calls", "failed", "eager_failed")
    return " ".join([name, *clocks, *(f"{key} {row[key]}" for key in (*rest, "graph_failed") if key in row)])


if __name__ == "__main__":
    sys.exit(main())
