"""Turn an adapter into another form: `python ptuning/convert.py --adapter output/advert --to merged --output_dir NEW`.

merged       the whole model with the adapter inside, for use as --model_name_or_path: LoRA added to the weights,
             a prefix beside them
published    a prefix as ChatGLM-6B's own scripts write and read it: pytorch_model.bin and config.json
safetensors  a prefix as this program's training writes it, from a published one for example
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import DEFAULT_MODEL, DTYPES, free_memory, main_errors  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Merge an adapter into its model, export or import it.")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the adapter to convert")
    parser.add_argument(
        "--to",
        required=True,
        choices=("merged", "published", "safetensors"),
        help="merged: a whole model; published: a prefix with pytorch_model.bin; safetensors: a prefix as training "
        "writes it",
    )
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="FOLDER", help="a folder that is new or empty"
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="FOLDER_OR_NAME",
        help="the model that the adapter was trained on; a prefix that has its config.json is exported and imported "
        "without it (default: the small model that comes with this program)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="number format of a merged model (default: as the base is stored)"
    )
    return parser


def main(argv=None) -> int:
    """Write the new folder and say what it is."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.dtype and args.to != "merged":
        parser.error("--dtype is for --to merged: a prefix stays in float32")
    with main_errors(parser):
        if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
            raise ValueError(f"--output_dir must be a folder that is new or empty, got {args.output_dir}")
        convert = merge if args.to == "merged" else export
        print(f"{args.output_dir}: {convert(args)}", file=sys.stderr)
    return 0


def merge(args: argparse.Namespace) -> str:
    """Write the base with the adapter inside; returns what to tell."""
    import torch

    from chatglm.adapters import merge_adapter, open_adapter
    from chatglm.checkpoint import load_tokenizer, load_weights

    adapter = open_adapter(args.adapter)
    checkpoint = checked_base(args, adapter)
    dtype = args.dtype or str(checkpoint.config.dtype or "float16").removeprefix("torch.")
    need, room = checkpoint.memory(DTYPES[dtype]).loading_peak + 4 * adapter.num_parameters, free_memory("cpu")
    if need > room:
        raise MemoryError(f"too little memory: merging needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")
    tokenizer = load_tokenizer(checkpoint)
    model = merge_adapter(load_weights(checkpoint, "cpu", getattr(torch, dtype)), adapter.folder)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return f"a whole model, {dtype}, with {adapter.title} inside: use it as --model_name_or_path"


def export(args: argparse.Namespace) -> str:
    """Write a prefix in another form; returns what to tell."""
    from chatglm.adapters import export_prefix, open_adapter

    adapter = open_adapter(args.adapter)
    if adapter.kind != "prefix":
        raise ValueError(f"{args.adapter} is {adapter.title}, which is in peft's form already; it can be --to merged")
    base = None
    if args.model_name_or_path or adapter.settings is None:
        base = checked_base(args, adapter).config
    export_prefix(adapter, base, args.output_dir, published=args.to == "published")
    return f"{adapter.title}{', with a projection' * adapter.prefix_projection}"


def checked_base(args: argparse.Namespace, adapter):
    """The checkpoint of the base, which the adapter fits; no weight is read."""
    import torch

    from chatglm import ChatGLMForConditionalGeneration
    from chatglm.adapters import check_adapter, check_mergeable
    from chatglm.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(args.model_name_or_path or DEFAULT_MODEL)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(checkpoint.config)
    check = check_mergeable if args.to == "merged" else check_adapter
    check(adapter, model)
    return checkpoint


if __name__ == "__main__":
    sys.exit(main())
