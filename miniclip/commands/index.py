"""Make the pictures of folders searchable, or bring an index up to date: only new and changed pictures are read.

It can be interrupted at any time; the same command then continues. torchrun shares the work among several processes.

    miniclip index photos -o photos.index
    miniclip index photos more/photos -o photos.index --model MobileCLIP-S0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.commands.options import add_batches, add_json, add_model, add_pictures, join_processes, path
from miniclip.commands.output import complain, report_rejected, show, show_json, shown
from miniclip.search.index import DEFAULT_MODEL

MODEL = f"a name or path (default: the index's own model; for a new index {DEFAULT_MODEL})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a folder with all that is in it, or a picture"
    parser.add_argument("inputs", nargs="+", type=path, metavar="FOLDER", help=help)
    parser.add_argument("-o", "--output", type=path, required=True, metavar="INDEX", help="the index, a directory")
    parser.add_argument("--faiss", action="store_true", help="also prepare approximate search (needs faiss)")
    add_batches(parser)
    add_pictures(parser)
    add_model(parser, None, MODEL, resize=False)  # for another size: `miniclip convert`, then name the new file
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.search.update import update_index

    if options.faiss:
        from miniclip.search import approximate

        approximate.check_installed()
    join_processes(options)
    try:
        report = update_index(
            options.output, options.inputs, options.model, activation=options.activation, device=options.device,
            dtype=options.dtype, batch_size=options.batch_size, workers=options.workers, approximate=options.faiss,
            upright=options.upright, hidden=options.hidden,
        )  # fmt: skip
    except KeyboardInterrupt:
        complain(f"interrupted; the same command continues where {options.output} stands")
        return 130
    if report is None:  # torchrun's first process reports
        return 0
    if options.json:
        show_json(report._asdict())
    else:
        show(_text(report, options.output))
    if report.left_out:
        complain("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.left_out.items())))
    return report_rejected(report.rejected, report.pictures + len(report.rejected))


def _text(report, output: Path) -> str:
    counts = {"new": report.added - len(report.changed), "changed": len(report.changed), "moved": len(report.moved)}
    counts |= {"deleted": len(report.deleted), "unchanged": report.unchanged}
    done = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    rate = f", {report.added / report.seconds:.1f} images/s" if report.added else ""
    lines = [f"moved: {shown(old)} -> {shown(new)}" for old, new in report.moved]
    lines += [f"deleted: {shown(path)}" for path in report.deleted]
    total = f"{shown(output)}: {report.pictures} pictures ({done or 'nothing new'}) in {report.seconds:.1f} s{rate}"
    return "\n".join([*lines, total])
