"""Copy the selection of recorded cases that travels with the repository.

    python tests/golden/make_selection.py path/to/a/full/golden/folder

Keeps every kind and all text cases. Of long series (forward passes by prompt length, everything done once per network,
quantised networks) it keeps some. Files are copied byte for byte; index.json lists what is here.
"""

import json
import pathlib
import shutil
import sys

TARGET = pathlib.Path(__file__).resolve().parent
FORWARD_LENGTHS = ("01", "02", "07", "08", "11", "20", "40")  # of forward_gmask_lenNN; 07 and 08 show every layer
ONCE_IS_ENOUGH = ("padded_", "incremental_", "train_batch_", "fp16_", "bf16_")  # large, and kept for network m64 only
QUANTIZED_MODELS = ("qmodel_fp16_int4_m64", "qmodel_int4_qe_m64")


def is_selected(case):
    name = case["id"]
    if case["kind"] == "quant_model":
        return name in QUANTIZED_MODELS
    if name.startswith("forward_gmask_len"):
        return name.endswith(FORWARD_LENGTHS)
    if name.startswith(ONCE_IS_ENOUGH):
        return name.endswith("_m64")
    if name.endswith("_m96_prefix_proj"):
        return False
    return not case.get("meta", {}).get("informational", False)


def main(source):
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    cases = [case for case in index["cases"] if is_selected(case)]
    lost = {case["kind"] for case in index["cases"]} - {case["kind"] for case in cases}
    if lost:
        raise ValueError(f"the selection must hold every kind, but has no case of {sorted(lost)}")
    names = {case.get("weights") for case in cases}
    names |= {case.get("meta", {}).get(key) for case in cases for key in ("extra_weights", "checkpoint")}
    weights = {name: entry for name, entry in index["weights"].items() if name in names}

    files = [entry["file"] for entry in weights.values()]
    files += [case[key] for case in cases for key in ("tensors", "text") if key in case]
    files += [f"tokenizer/{path.name}" for path in (source / "tokenizer").iterdir()]
    for folder in ("weights", "cases", "text", "tokenizer"):
        shutil.rmtree(TARGET / folder, ignore_errors=True)
        (TARGET / folder).mkdir()
    for name in files:
        shutil.copyfile(source / name, TARGET / name)
    selection = json.dumps(index | {"weights": weights, "cases": cases}, ensure_ascii=False, indent=1)
    (TARGET / "index.json").write_text(selection + "\n", encoding="utf-8")
    size = sum((TARGET / name).stat().st_size for name in [*files, "index.json"])
    print(f"{len(cases)} of {len(index['cases'])} cases, {len(files)} files, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/golden/make_selection.py FULL_GOLDEN_FOLDER")
    main(pathlib.Path(sys.argv[1]))
