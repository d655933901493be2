#!/usr/bin/env bash
# DMA beside other attention layers: language models, needles, a conversion, associative recall.
#
#   python benchmarks/language.py prepare --tokens runs/tokens
#   benchmarks/experiments.sh OUT runs/tokens smollm2-135m [SECONDS]
#
# Jobs in the order of what they tell, two at a time on each GPU of GPUS (all by default); one that needs more seconds than are left
# is not begun, and all end after SECONDS (570). Rows are added to OUT/*.jsonl as they are measured, those that are there already are
# not measured again: call it again to go on, or with OUT = benchmarks/results to add to those. Output goes to OUT/experiments.log.
# Tables and figures are made later, on any machine, with --minutes 0:
#
#   python benchmarks/mqar.py --minutes 0 --out OUT/mqar.jsonl
#
# Measured on an H200 with one job at a time: 900 steps of a language model take 60 to 65 s (nsa 180 s); nine recall models of 5000
# steps side by side 113 s at 256 tokens and 174 s at 512; a step of the conversion .16 s, and measuring it 75 to 130 s.
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

measure() { # SCRIPT ARGUMENTS... A report of some of the rows is no use and is removed.
    timeout $((end - $(date +%s))) python3 "benchmarks/$1.py" "${@:2}" --out "$out/$1.jsonl"
    rm -f "$out/$1".md "$out/$1"*.png
}

language() { # LAYERS SEEDS
    local own=$models/$1-$2
    measure language train --tokens "$tokens" --models "$own" --layers "$1" --seeds "$2" --steps 900 --minutes "$(left 50)"
    measure needle --tokens "$tokens" --models "$own" --minutes "$(left 10)" \
        --items 4 --depths 0.1,0.5,0.9 --lengths 2048,4096,8192,16384
}

conversion() { # W
    measure convert "$model" --keeps "$1" --tokens 2500000 --minutes "$(left 120)"
}

recall() { # SHAPES LAYERS PARTS SEEDS
    measure mqar --shapes "$1" --layers "$2" --parts "$3" --seeds "$4" --rates 3e-3 --minutes "$(left 30)"
}

run() { # NEEDS COMMAND...
    [ $((end - $(date +%s))) -lt "$1" ] && return
    local all
    IFS=, read -ra all <<< "$gpus"
    export CUDA_VISIBLE_DEVICES=${all[$((slot % ${#all[@]}))]}
    "${@:2}"
}

export -f left measure language conversion recall run
{
    xargs -P $((2 * $(tr ',' '\n' <<< "$gpus" | wc -l))) --process-slot-var=slot -I{} bash -c "run {}" << JOBS
150 language dma-window,dma-all,swa-quarter 1
120 recall 1024x128,256x128 mha,dma-window 2,8 1
160 conversion 256
120 recall 256x64 mha,dma,dma-window,swa 2,8 2
120 recall 256x64+noise,256x256 mha,dma-window 2,8 1
150 recall 512x128,2048x128 mha,dma-window 2,8 1
120 language mha,dma-window 2
100 recall 512x64 mha,dma,dma-window 2 2
80 recall 256x32 mha,dma-window 2,8 1
100 language dma 2
220 language nsa 1
JOBS
    rm -rf "$models"
} >> "$out/experiments.log" 2>&1
