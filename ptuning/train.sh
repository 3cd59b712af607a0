#!/usr/bin/env bash
# P-Tuning v2 on the advertisement set: from the attributes of a garment to its advertisement.
#
#     bash train.sh                                  # the small model that comes with this program, on the CPU too
#     bash train.sh --model_name_or_path THUDM/chatglm-6b --quantization_bit 4
#
# What is added behind `bash train.sh` goes to main.py and wins over what stands here. A run that was interrupted
# continues when the same command is given again; --overwrite_output_dir starts anew.
set -euo pipefail
cd "$(dirname "$0")"

PRE_SEQ_LEN=${PRE_SEQ_LEN:-64} # length of the trained prefix, tokens; 128 for ChatGLM-6B
LR=${LR:-3e-1}                 # learning rate; 2e-2 for ChatGLM-6B

FLAGS=(
    --do_train
    --train_file data/advert/train.json  # {"content": ..., "summary": ...}, one object a line
    --prompt_column content              # what the model reads
    --response_column summary            # what it learns to answer
    --output_dir output/advert-pt        # checkpoints while training, at the end the adapter
    --pre_seq_len "$PRE_SEQ_LEN"
    --learning_rate "$LR"
    --max_source_length 64               # tokens of a prompt, and of an answer; the rest is cut
    --max_target_length 96
    --per_device_train_batch_size 8      # examples at a time: fewer need less memory,
    --gradient_accumulation_steps 1      # and more of these make up for it
    --max_steps 200
    --logging_steps 10                   # steps between two values of the loss
    --save_steps 100                     # steps between two checkpoints,
    --save_total_limit 2                 # of which the newest so many are kept
    --general_file data/general/dev.jsonl # how much of the rest is forgotten: perplexity before and after
)
python main.py "${FLAGS[@]}" "$@"
