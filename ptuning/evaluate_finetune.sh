#!/usr/bin/env bash
# BLEU-4 and ROUGE of a model whose parameters were all trained, by default of what ds_train_finetune.sh made.
#
# What is added behind `bash evaluate_finetune.sh` goes to main.py and wins over what stands here.
set -euo pipefail
cd "$(dirname "$0")"

CHECKPOINT=${CHECKPOINT:-advert-full} # a folder in output/

FLAGS=(
    --do_predict
    --test_file data/advert/dev.json
    --prompt_column content
    --response_column summary
    --model_name_or_path "output/$CHECKPOINT" # a whole model, with its tokenizer
    --output_dir "output/$CHECKPOINT"         # generated_predictions.txt and predict_results.json go there
    --predict_with_generate
    --max_source_length 64                    # as in training
    --max_target_length 96                    # most tokens of a reference, for the loss,
    --val_max_target_length 96                # and of an answer
    --num_beams 1                             # 1 takes the likeliest token each time; 4 searches, four times as long
    --per_device_eval_batch_size 32           # questions at a time
)
python main.py "${FLAGS[@]}" "$@"
