#!/usr/bin/env bash
# DMA beside other attention layers: language models, needles, a conversion, associative recall.
#
#   python benchmarks/language.py prepare --tokens runs/tokens --characters 110e6
#   benchmarks/experiments.sh OUT runs/tokens smollm2-135m [SECONDS]
#
# Jobs in the order of what they tell, those with rows in results/ last, four at a time on each GPU (GPUS, all by default). One that
# needs more seconds than are left is not begun, and all end after SECONDS (570). Rows are added to OUT/*.jsonl as they are measured,
# those that are there already are not measured again: call it again to go on, or with OUT = benchmarks/results to add to those. Output
# goes to OUT/experiments.log. Tables and figures are made later, on any machine, with --minutes 0:
#
#   python benchmarks/mqar.py --minutes 0 --out OUT/mqar.jsonl
#
# Measured on an H200 with one job at a time: 900 steps of a language model take 60 to 65 s (nsa 180 s); a step of the conversion
# .16 s, and measuring it 75 to 130 s; 1000 steps of a recall model, nine side by side, 2.5 s at 256 tokens and 4 s at 512 before
# logits were made for the questions alone. Beside three other jobs 900 steps with 77 M parameters take 420 to 450 s (nsa 805 s: give
# it 870), seven recall models of 1024 x 256 for 1500 steps 330 s. A model that has its row is not trained again, so needles that were
# not reached come with the next seed.
set -u
out=$(realpath "$1") tokens=$(realpath "$2") model=$3 end=$(($(date +%s) + ${4:-570}))
gpus=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
models=$(mktemp -d)
cd "$(dirname "$0")/.."
export TQDM_DISABLE=1 PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} out tokens model models end gpus

left() { # SECONDS to leave to what comes after: minutes until then
    local seconds=$((end - $(date +%s) - $1))
    echo $((seconds / 60)).$((seconds % 60 / 6))
}

measure() { # SCRIPT NAME ARGUMENTS... A report of some of the rows is no use and is removed.
    timeout $((end - $(date +%s))) python3 "benchmarks/$1.py" "${@:3}" --out "$out/$2.jsonl"
    rm -f "$out/$2".md "$out/$2"*.png
}

language() { # LAYERS SEEDS [STEPS NAME OPTIONS...]
    local own=$models/$1-$2-${3:-900}${4:-}
    measure language "language${4:-}" train --tokens "$tokens" --models "$own" --layers "$1" --seeds "$2" --steps "${3:-900}" \
        --minutes "$(left 50)" "${@:5}"
    [ -d "$own" ] || return 0 # no model was trained, as all have rows
    measure needle "needle${4:-}" --tokens "$tokens" --models "$own" --minutes "$(left 10)" \
        --items 4 --depths 0.1,0.5,0.9 --lengths 2048,4096,8192,16384
}

large() { # LAYERS SEEDS: 77 M parameters instead of 31 M, on the same batches
    language "$1" "$2" 900 -large --hidden 768 --depth 10 --heads 12 --intermediate 2048 --rate 1.3e-3
}

conversion() { # W STEPS. The model's file may still be on its way.
    until [[ $model != *.gguf || -e $model || $(date +%s) -ge $end ]]; do sleep 1; done
    measure convert convert "$model" --keeps "$1" --steps "$2" --minutes "$(left 120)"
}

recall() { # SHAPES LAYERS [OPTIONS...]
    measure mqar mqar --shapes "$1" --layers "$2" --seeds 2 --test-examples 128 --minutes "$(left 15)" "${@:3}"
}

run() { # NEEDS COMMAND...
    [ $((end - $(date +%s))) -lt "$1" ] && return
    local all
    IFS=, read -ra all <<< "$gpus"
    export CUDA_VISIBLE_DEVICES=${all[$((slot % ${#all[@]}))]}
    "${@:2}"
}

queue() { # JOBS at a time on each GPU
    local count
    count=$(tr ',' '\n' <<< "$gpus" | wc -l)
    xargs -P $(($1 * count)) --process-slot-var=slot -I{} bash -c "run {}"
}

export -f left measure language large conversion recall run
{
    # Every second one of the first is for the second GPU where there are two: the long ones together, as they end together.
    queue 4 << JOBS
400 recall 256x256,512x256,1024x256 dma,dma-window --rates 3.5e-4 --seeds 1
500 large gqa 2
500 large dma-window 2
500 large mha 2
500 large swa 2
500 large mqa 2
500 large mla 2
120 recall 1024x32 mha,dma,dma-window,swa
400 recall 2048x256 mha,dma,dma-window,swa --rates 7e-4 --seeds 1
400 recall 2048x256 dma,dma-window,swa --rates 3.5e-4 --seeds 1
860 large nsa 2
350 recall 1024x256 mha,dma,dma-window,swa --rates 7e-4 --seeds 1
270 recall 256x256,256x128 mha,dma,dma-window,swa --rates 7e-4 --seeds 1
150 language swa 2
150 language dma-window 3
130 recall 512x256x4 dma,dma-window --rates 7e-4 --seeds 1
100 recall 512x64 mha,dma-window --no-convolution
120 recall 2048x32 mha,dma,dma-window,swa --seeds 1
100 recall 2048x128 mha,dma,dma-window,swa --rates 7e-4 --seeds 1
120 recall 512x256x4 nsa --seeds 1
300 language dma-all 1 1600 -long
400 conversion 256 1000
350 conversion 512 300
450 language nsa 1
250 language mqa,gqa,mla,mha 1
400 language dma-window,mha,swa 1 1600 -long
60 recall 512x64+noise mha,dma,dma-window,swa --seeds 1
100 recall 512x256 mha,dma,dma-window,swa --rates 7e-4 --seeds 1
150 recall 512x64,1024x64,512x128,2048x64,1024x128,256x64 mha,dma,dma-window,swa
150 recall 512x128,1024x128 dma,dma-window --rates 7e-4
80 recall 256x32,512x32 mha,dma,dma-window,swa --seeds 1
150 recall 512x256x4 mha,gqa,mqa,mla,dma,dma-window,swa --seeds 1
JOBS
    rm -rf "$models"
} >> "$out/experiments.log" 2>&1
