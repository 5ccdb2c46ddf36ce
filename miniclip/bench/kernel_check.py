"""Check every kernel against float64 on the GPU at hand, and time it against PyTorch.

    python -m miniclip.kernels.check             on a GPU: errors, then times; within ten minutes
    python -m miniclip.kernels.check --dry       here: errors only, in Triton's interpreter on the CPU, in seconds
    python -m miniclip.kernels.check --json      the same as one JSON object

The exit status is 1 if any kernel's error is over its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m miniclip.kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="errors only, in Triton's interpreter, without a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further measurement after this long (9)")
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        from miniclip.kernels import interpreter  # noqa: F401
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use; --dry checks the kernels' results without one")

    from miniclip.bench import kernel_errors

    say = (lambda *_: None) if options.json else print
    device = torch.device("cpu" if options.dry else "cuda")
    say("In Triton's interpreter, on the CPU: errors only.\n" if options.dry else "")
    report = {"interpreted": options.dry, "errors": []}
    say(f"{'error against float64':40} {'':18} {'kernel':>10} {'PyTorch':>10} {'tolerance':>10}")
    for row in kernel_errors.check(device, options.dry):
        report["errors"].append(row)
        verdict = "" if row["ok"] else "  TOO LARGE"
        name = f"{row['operation']:26} {row['dtype']:9} {row['shape']:24}"
        say(f"{name} {row['kernel']:10.1e} {row['pytorch']:10.1e} {row['tolerance']:10.1e}{verdict}")
    if not options.dry:
        from miniclip.bench import kernel_times

        report |= kernel_times.measure(device, say, 60 * options.minutes)
    failed = sum(not row["ok"] for row in report["errors"])
    say(f"\n{failed} of {len(report['errors'])} errors are over their tolerance")
    if options.json:
        print(json.dumps(report))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
