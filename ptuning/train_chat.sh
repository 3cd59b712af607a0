#!/usr/bin/env bash
# LoRA, or with PRE_SEQ_LEN P-Tuning v2, on conversations of several rounds: the helper of a tea house.
#
#     bash train_chat.sh   # the small model that comes with this program learns faster by LoRA
#     PRE_SEQ_LEN=128 LR=1e-2 bash train_chat.sh --model_name_or_path THUDM/chatglm-6b --quantization_bit 4
#
# What is added behind `bash train_chat.sh` goes to main.py and wins over what stands here. A run that was interrupted
# continues when the same command is given again; --overwrite_output_dir starts anew.
set -euo pipefail
cd "$(dirname "$0")"

PRE_SEQ_LEN=${PRE_SEQ_LEN:-} # length of a trained prefix, tokens; empty: LoRA
LR=${LR:-3e-3}               # learning rate; with a prefix 3e-1, or 1e-2 for ChatGLM-6B

if [[ $PRE_SEQ_LEN ]]; then
    METHOD=(--pre_seq_len "$PRE_SEQ_LEN")
else
    METHOD=(--lora_rank 16 --lora_target query_key_value dense dense_h_to_4h dense_4h_to_h)
fi

FLAGS=(
    --do_train
    --train_file data/chat/train.json      # {"prompt": ..., "response": ..., "history": [[question, answer], ...]}
    --prompt_column prompt                 # the last question
    --response_column response             # the answer to it
    --history_column history               # the rounds before
    --train_on_all_turns                   # learn the answers of the earlier rounds too
    --output_dir output/chat
    "${METHOD[@]}"
    --learning_rate "$LR"
    --max_source_length 192                # tokens of a prompt with its earlier rounds; the oldest rounds are cut first
    --max_target_length 64                 # tokens of an answer
    --per_device_train_batch_size 8        # examples at a time: fewer need less memory,
    --gradient_accumulation_steps 1        # and more of these make up for it
    --max_steps 500
    --logging_steps 10                     # steps between two values of the loss
    --save_steps 100                       # steps between two checkpoints,
    --save_total_limit 2                   # of which the newest so many are kept
    --replay_file data/general/replay.jsonl # general dialogues are mixed in, against forgetting,
    --replay_ratio 0.2                     # as this share of all examples
    --general_file data/general/dev.jsonl  # how much is forgotten all the same: perplexity before and after
)
python main.py "${FLAGS[@]}" "$@"
