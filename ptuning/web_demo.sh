#!/usr/bin/env bash
# Base and tuned model side by side in the browser, by default with what train.sh made.
#
#     CHECKPOINT=chat bash web_demo.sh
#     bash web_demo.sh --model_name_or_path THUDM/chatglm-6b --quantization_bit 4   # the base that was tuned
#
# What is added behind `bash web_demo.sh` goes to web_demo.py and wins over what stands here.
set -euo pipefail
cd "$(dirname "$0")"

CHECKPOINT=${CHECKPOINT:-advert-pt} # a folder in output/, such as advert-pt, advert-pt/checkpoint-200 or advert-full

FLAGS=(
    --ptuning_checkpoint "output/$CHECKPOINT" # the adapter, or a model whose parameters were all trained
    --host 127.0.0.1                          # 0.0.0.0 lets other machines in
    --port 7860                               # http://127.0.0.1:7860
    --max_length 2048                         # where the sliders stand at first: most tokens of prompt + answer,
    --top_p 0.7                               # probability of the candidates that are sampled from,
    --temperature 0.95                        # and how varied answers are; 0 takes the likeliest token
)
python web_demo.py "${FLAGS[@]}" "$@"
