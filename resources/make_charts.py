"""Pictures of the benchmarks for the READMEs: `python resources/make_charts.py`, drawn from benchmarks/README.md.

Needs matplotlib, which pretraining/requirements.txt brings. Each picture carries its figures as a text chunk of the
PNG, so that a test sees when the tables have moved on.
"""

import argparse
import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BENCHMARKS = FOLDER.parent / "benchmarks" / "README.md"
OURS, PEER, TUNING = "#0072B2", "#E69F00", "#009E73"  # of Okabe and Ito, told apart by colour-blind people too
GIB = 2**30 / 1e9


def tables(text):
    """The tables of the fenced blocks without a language, in order: (first line, other lines), as lists of strings."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for table in block.strip().split("\n\n") if not language else ():
            header, *rows = (re.split(r" {2,}", line.strip()) for line in table.splitlines())
            yield header, rows


def benchmark(text, title, *columns):
    """(column, row, unit) -> number, of the last table whose first line is this title and these columns.

    The last one: INT8 was measured twice, the second time with the memory as fast as for INT4.
    """
    wanted = [*([title] if title else []), *columns]
    found = [rows for header, rows in tables(text) if header == wanted]
    if not found:
        raise ValueError(f"{BENCHMARKS}: no table {' | '.join(wanted)}")
    return {
        (column, row[0], row[1]): float(value.replace(",", ""))
        for row in found[-1]
        for column, value in zip(columns, row[2:], strict=True)
        if value != "-"
    }


def tuning_peaks(text):
    """{(weights, method): peak memory in GB} of the table of bench_tuning.py."""
    ((header, rows),) = (table for table in tables(text) if table[0][:2] == ["weights", "method"])
    return {(row[0], row[1]): float(row[header.index("peak, GB")]) for row in rows}


def figures(text):
    """What the pictures show: {picture: {panel: {bar: number}}}; a bar of chatglm.cpp has "chatglm.cpp" in its name."""
    whole = benchmark(text, "", "tiny float16", "6b bfloat16")
    quantised = {bits: benchmark(text, bits, "default", "chatglm.cpp") for bits in ("INT8", "INT4")}
    small = benchmark(text, "INT4", "default", "embedding4")
    trained = tuning_peaks(text)

    def both(*row):
        return {
            bits + of: table[column, *row]
            for bits, table in quantised.items()
            for column, of in (("default", ""), ("chatglm.cpp", ", chatglm.cpp"))
        }

    def speed(row):
        return {"bfloat16": whole["6b bfloat16", row, "tokens/s"], **both(row, "tokens/s")}

    peak = "peak memory, context 1024", "GB"
    answering = {"bfloat16": round(whole["6b bfloat16", "peak memory", "GiB"] * GIB, 2), **both(*peak)}
    answering["INT4, embedding INT4"] = small["embedding4", *peak]
    methods = {"ptuning": "P-Tuning v2", "lora": "LoRA"}
    return {
        "benchmark_speed": {
            "Answering, tokens/s (after 32 tokens)": speed("decode after 32 tokens"),
            "Reading a prompt, tokens/s (256 tokens)": speed("prefill, 256 tokens"),
        },
        "benchmark_memory": {
            "Answering, peak GB (context 1024)": answering,
            "Fine-tuning, peak GB (64 + 64 tokens)": {
                f"{bits}, {methods[method]}": gigabytes for (bits, method), gigabytes in trained.items()
            },
        },
    }


def machine(text):
    """The machine of the results of bench_quantization.py, as the README names it."""
    results = text[text.index("### Results") :]
    return re.search(r"^Machine: ([^;]+);", results, flags=re.MULTILINE)[1]


def draw(path, title, panels, caption):
    """One picture: a panel of bars for each entry of panels, the caption below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.family"] = "DejaVu Sans"  # comes with matplotlib
    figure, places = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained")
    for axes, (name, bars) in zip(places, panels.items(), strict=True):
        colours = [PEER if "chatglm.cpp" in bar else TUNING if name.startswith("Fine-tuning") else OURS for bar in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours, height=0.68)
        axes.bar_label(drawn, [f"{value:.3g}" for value in bars.values()], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(bars.values()))
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelsize=9, length=0)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8, color="#444444", x=0.01, ha="left")
    figure.savefig(path, metadata={"Figures": json.dumps(panels)}, facecolor="white")
    plt.close(figure)


def main():
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description="Pictures of the benchmarks, from the tables in benchmarks/README.md.")
    parser.parse_args()
    text = BENCHMARKS.read_text(encoding="utf-8")
    numbers = figures(text)
    caption = (
        f"ChatGLM-6B shape, random weights. {machine(text)}.\n"
        "bfloat16: a run of its own. Commands and all figures: benchmarks/README.md"
    )
    speed, memory = numbers["benchmark_speed"], numbers["benchmark_memory"]
    draw(FOLDER / "benchmark_speed.png", "Speed on a CPU: this project and chatglm.cpp 0.4.2", speed, caption)
    draw(FOLDER / "benchmark_memory.png", "Memory on a CPU", memory, caption)


if __name__ == "__main__":
    main()
