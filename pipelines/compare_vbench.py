"""Presets judged by VBench: many prompts dense and with every preset, laid out for it.

    python pipelines/compare_vbench.py --prompts configs/prompts/real.txt --model MODEL
    python pipelines/compare_vbench.py --python ENV/bin/python --dimension temporal_flickering
    --device cpu

Takes up finished jobs from --out. Writes OUT/compare as `vidsparse compare` does and OUT/vbench as
`vidsparse vbench export` does; with --python VBench runs in that environment, and its results go
into OUT/compare. --standard is for prompts of VBench's own list, with --samples 5.
"""

from __future__ import annotations

from pathlib import Path

from compare_psnr import arguments, compare_arms, ended, generate_arms
from rich.console import Console

from vidsparse.vbench.display import Display, table
from vidsparse.vbench.export import Request, export
from vidsparse.vbench.importing import merge
from vidsparse.vbench.run import Request as RunRequest
from vidsparse.vbench.run import run


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "outputs/compare_vbench")
    parser.add_argument("--standard", action="store_true", help="VBench's own prompts and names")
    parser.add_argument("--full-info", type=Path, help="VBench's list of prompts")
    parser.add_argument("--python", type=Path, help="of the environment with VBench")
    parser.add_argument("--dimension", action="append", default=[], help="again for more")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    display = Display(Console(stderr=True))
    with ended(options.out):
        made = generate_arms(options, display.console)
        compare_arms(made, options.out / "compare", display.console)
        sources = [(jobs[0].out.parent, preset) for preset, jobs in made.items()]
        place = options.out / "vbench"
        export(Request(sources, place, custom=not options.standard, full_info=options.full_info),
               display)  # fmt: skip
        if options.python is None:
            display.say(f"{place}/README.txt says how to run VBench on it")
            return
        request = RunRequest(options.python, place, options.out / "results",
                             tuple(options.dimension), options.device)  # fmt: skip
        added, notes = merge(run(request, display.say), options.out / "compare")
    display.console.print(table(added))
    for note in notes:
        display.say(f"note: {note}")


if __name__ == "__main__":
    main()
