#!/usr/bin/env bash
# DMA beside other attention layers on four GPUs of one host: language models, needles, a conversion, associative recall.
#
#   python benchmarks/language.py prepare --tokens runs/tokens
#   benchmarks/experiments.sh OUT runs/tokens smollm2-135m
#
# Seven and a half minutes. Measured on H200 GPUs: 900 steps of a language model take 60 s (nsa 180 s); nine recall models of 5000
# steps side by side 113 s at 256 tokens and 174 s at 512; a conversion is measured in 75 to 130 s each time. STEPS (of the
# language models) and RATES (of recall) may be set. Rows are added to OUT/*.jsonl as they are measured, those that are there
# already are not measured again; output goes to OUT/experiments.log. Tables and figures are made later, on any machine, with
# --minutes 0:
#
#   python benchmarks/mqar.py --minutes 0 --out OUT/mqar.jsonl
set -u
out=$(realpath "$1") tokens=$(realpath "$2") model=$3
models=$(mktemp -d)
cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}

# GPU SCRIPT ARGUMENTS... Where a training step cannot be captured in a graph it runs without. A report of some of the rows is no
# use and is removed.
on() {
    measure "$@" || [ "$2" = needle ] || [ $SECONDS -gt 240 ] || measure "$@" --no-graph
    rm -f "$out"/*.md "$out"/*.png
}

measure() {
    CUDA_VISIBLE_DEVICES=$1 timeout $((450 - SECONDS)) python "benchmarks/$2.py" "${@:3}" --out "$out/$2.jsonl"
}

language() { # GPU MINUTES LAYERS
    on "$1" language train --tokens "$tokens" --models "$models/$1" --layers "$3" --minutes "$2" --steps "${STEPS:-900}"
    on "$1" needle --tokens "$tokens" --models "$models/$1" --minutes 1 --items 4 --depths 0.1,0.5,0.9 --lengths 2048,4096,8192,16384
}

recall() { # GPU MINUTES SEEDS SHAPES
    on "$1" mqar --minutes "$2" --layers mha,dma,dma-window,nsa,swa --seeds "$3" --rates "${RATES:-3e-3}" --shapes "$4"
}

{
    language 0 5.5 nsa,dma-window &
    (
        language 1 3.6 mha,dma,swa
        recall 1 2.5 1 256x64+noise
    ) &
    recall 2 7 2 256x64,512x64 &
    (
        on 3 convert "$model" --keeps 256 --minutes 1 --tokens 2500000
        recall 3 2 1 256x32
    ) &
    wait
    rm -rf "$models"
} >> "$out/experiments.log" 2>&1
