"""Convert a finished student to GGUF, for llama.cpp and Ollama, with llama.cpp's own converter.

    python workflow/scripts/export.py results/runs/soft/<id> --to gguf --outtype q8_0

The converter is found by --converter, by the variable LLAMA_CPP (llama.cpp's folder), on PATH, or in a folder llama.cpp
here, in your home or in /opt.
"""

from pathlib import Path

from retort.cli import run_script, script_parser

_OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")


def main() -> None:
    """Write the GGUF file."""
    parser = script_parser(__doc__)
    parser.add_argument("student", type=Path, help="a run's folder, or its final/")
    parser.add_argument("--to", required=True, choices=["gguf"], help="the format")
    parser.add_argument(
        "--outtype", choices=_OUTTYPES, default="f16", help="type of the weights (f16)"
    )
    parser.add_argument(
        "--out", type=Path, help="the file; by default <run>.<outtype>.gguf beside final/"
    )
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py, or its folder")
    args = parser.parse_args()
    from retort.pipeline.gguf import export_gguf

    file = export_gguf(args.student, outtype=args.outtype, out=args.out, converter=args.converter)
    print(f"{file}  {file.stat().st_size:,} bytes")
    print(f"For Ollama: echo 'FROM {file.resolve()}' > Modelfile; ollama create NAME -f Modelfile")


if __name__ == "__main__":
    run_script(main)
