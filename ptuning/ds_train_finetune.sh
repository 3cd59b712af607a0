#!/usr/bin/env bash
# Train all parameters with DeepSpeed ZeRO-2: gradients and optimiser states are shared out among the GPUs. Without a
# GPU it runs on the CPU, for trying out.
#
#     bash ds_train_finetune.sh --model_name_or_path THUDM/chatglm-6b
#
# What is added behind `bash ds_train_finetune.sh` goes to main.py and wins over what stands here. A run that was
# interrupted continues when the same command is given again; --overwrite_output_dir starts anew.
set -euo pipefail
cd "$(dirname "$0")"

if ! python -c 'import deepspeed' 2> /dev/null; then
    echo "ds_train_finetune.sh: the package deepspeed is missing: DS_BUILD_OPS=0 pip install deepspeed" >&2
    exit 2
fi

LR=${LR:-5e-4} # learning rate; 1e-4 for ChatGLM-6B
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
NUM_GPUS=${NUM_GPUS:-$GPUS} # processes, one for each GPU

FLAGS=(
    --deepspeed deepspeed.json
    --do_train
    --train_file data/advert/train.json  # {"content": ..., "summary": ...}, one object a line
    --prompt_column content              # what the model reads
    --response_column summary            # what it learns to answer
    --output_dir output/advert-full      # checkpoints while training, at the end the model
    --learning_rate "$LR"
    --max_source_length 64               # tokens of a prompt, and of an answer; the rest is cut
    --max_target_length 96
    --per_device_train_batch_size 8      # examples at a time on each GPU: fewer need less memory,
    --gradient_accumulation_steps 1      # and more of these make up for it
    --max_steps 150
    --logging_steps 10                   # steps between two values of the loss
    --save_steps 50                      # steps between two checkpoints, each three times the model,
    --save_total_limit 1                 # of which the newest so many are kept
    --general_file data/general/dev.jsonl # how much of the rest is forgotten: perplexity before and after
)
if ((NUM_GPUS)); then
    FLAGS+=(--bf16) # compute in bfloat16; the optimiser keeps float32
else
    FLAGS+=(--use_cpu)
fi
python -m torch.distributed.run --standalone --nproc_per_node=$((NUM_GPUS ? NUM_GPUS : 1)) main.py "${FLAGS[@]}" "$@"
