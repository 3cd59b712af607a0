#!/usr/bin/env bash
# BLEU-4 and ROUGE of a prefix or LoRA adapter, by default of what train.sh made; `CHECKPOINT= bash evaluate.sh`
# evaluates the untuned model. Answers go to generated_predictions.txt, scores to predict_results.json in --output_dir.
#
# What is added behind `bash evaluate.sh` goes to main.py and wins over what stands here.
set -euo pipefail
cd "$(dirname "$0")"

CHECKPOINT=${CHECKPOINT-advert-pt} # a folder in output/, such as advert-pt or advert-pt/checkpoint-200

FLAGS=(
    --do_predict
    --test_file data/advert/dev.json
    --prompt_column content
    --response_column summary
    ${CHECKPOINT:+--ptuning_checkpoint "output/$CHECKPOINT"} # the adapter
    --output_dir "output/${CHECKPOINT:-untuned}"
    --predict_with_generate
    --max_source_length 64           # as in training
    --max_target_length 96           # most tokens of a reference, for the loss,
    --val_max_target_length 96       # and of an answer
    --num_beams 1                    # 1 takes the likeliest token each time; 4 searches, four times as long
    --per_device_eval_batch_size 32  # questions at a time
)
python main.py "${FLAGS[@]}" "$@"
