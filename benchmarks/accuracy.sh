#!/usr/bin/env bash
# Accuracy against density on GPUs: the rows behind docs/LOG.md's tables, part by part.
#
#   benchmarks/accuracy.sh PART OUT WORK MODELS [SECONDS]
#
# PART: main (Qwen, 2K to 8K), rest (Qwen at 1K and 16K, and in which phase single keys fail), small (SmolLM2, and the ablation),
# tests (heads one by one, needles, topics, float32), probing (Qwen, 2K to 8K: single keys chosen by more queries);
# all: what results/eval-spread.jsonl lacks of these, the most telling first, in one list that all processes share (accuracy.txt);
# early: SmolLM2's lines of that list, for the time until the other model is there; capture: what a capture length of 8192 costs and
# gives, whose sums of 72 GB are on the CPU (THREADS, 8); warm: compile kernels, which needs no models.
# MODELS: a folder with qwen2.5-coder-0.5b.gguf and smollm2-135m.gguf.
# WORK: rows, plans and claims, shared by all parts; plans that it holds are not made again, and a part that was cut off goes on when
# it is called again. OUT: gets accuracy.tgz, what is worth keeping. GPU (0): the first one. GPUS (1): how many. EACH (8): processes
# on each. Nothing begins after SECONDS (400), and all ends GRACE (40) seconds later. TINY=tokens tries `all`, `early` and `capture` with
# two documents of so many tokens and SmolLM2, or a model in the folder smollm2-135m, for both models (with GPU=none EACH=2 on a CPU).
set -u
part=$1 out=$(realpath "$2") work=$3 qwen=$4/qwen2.5-coder-0.5b.gguf smol=$4/smollm2-135m.gguf seconds=${5:-400}
gpu=${GPU:-0} gpus=${GPUS:-1} each=${EACH:-8} tiny=${TINY:-}
cd "$(dirname "$0")/.."
mkdir -p "$work" "$out"
export PYTHONPATH=src:benchmarks${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if [ -n "$tiny" ]; then
    [ -e "$smol" ] || smol=${smol%.gguf}
    qwen=$smol
fi

OURS=budget-0,budget-prompt
PUBLISHED=minference-,xattention-0.7,xattention-0.9,xattention-prompt-0.9,flashprefill,streaming-llm-0.1,streaming-llm-0.25
PUBLISHED=$PUBLISHED,streaming-llm-0.5,streaming-llm-prompt,window-0.25,longformer-0.25,bigbird-0.25,moa-0.25,h2o-0.2,snapkv-0.2
RAILED=budget-0,minference-0.8,minference-0.9,xattention-0.9,flashprefill-0.1,streaming-llm-0.1,streaming-llm-0.25,keys-0.9
FIRST=budget-0.2,budget-0.1,budget-prompt-0.1,budget-prompt-0.2,minference-0.9,minference-prompt-0.9,xattention-0.9,dam-,keys-0.9
MADE=budget,budget-kv,profiled,chosen,fixed,caches
# Of the ablation the capture lengths alone; texts as long in all as with lengths to 4096 and up to 8 documents.
CAPTURES=(--lams 0.5 --taus 0.3 --mus 0.8 --domains text --items 8 --dtype "${DTYPE:-bfloat16}")

fleet() { # NAME PROCESSES SECONDS SCRIPT ARGUMENTS...
    local limit=$(($3 + ${GRACE:-40})) # what has begun may end
    GPU_ARGUMENTS=(--gpus "$gpus" --first "$gpu")
    [ "$gpu" = none ] && GPU_ARGUMENTS=(--gpus 0)
    python3 benchmarks/fleet.py "${GPU_ARGUMENTS[@]}" --each "$2" --threads 2 --seconds "$limit" --logs "$work/logs-$1" -- \
        python3 "benchmarks/$4.py" "${@:5}" --seconds "$3" --shard "{shard}"
}

collect() { # Everything that is worth keeping, as one file.
    local kept=$work/kept
    mkdir -p "$kept"
    python3 benchmarks/pareto_figures.py "$work" --join-only --out "$kept/eval"
    for file in "$work"/logs-*/*.log "$work"/*.log; do [ -f "$file" ] && echo "== $file" && cut -c 1-300 "$file"; done > "$kept/eval.log"
    [ -d "$work/heads" ] && cp "$work"/heads/{rows-*.jsonl,heads.md,plan.txt} "$kept"
    [ -d "$work/ablation" ] && cp "$work"/ablation/*.{jsonl,md} "$kept"
    [ -d "$work/capture" ] && cat "$work"/capture/*-0.jsonl > "$kept/capture.jsonl"
    (cd "$work" && tar czf "$out/accuracy.tgz" kept $(ls -d measured plans/*/*/{fitted,thorough} 2> /dev/null)) && rm -f "$out"/partial.*
    wc -l "$kept"/*.jsonl
    grep -h Error "$work"/logs-*/*.log | cut -c 1-200 | sort | uniq -c | sort -rn | head
}

salvage() { # Every minute what there is, should the whole be cut off.
    while sleep 60; do
        # tar complains of logs that grow while it reads them.
        (cd "$work"; tar czf "$out/partial.tmp" $(ls -d rows-*.jsonl logs-* heads ablation measured); mv "$out/partial.tmp" "$out/partial.tgz")
    done > /dev/null 2>&1
}

missed() { # The plan within a quarter of the pairs that loses most on Qwen, of our best in each place; saved for heads.py.
    python3 - "$work" << 'PYTHON'
import sys
from pathlib import Path
from pareto import join
from pareto_plans import Shelf, railed
work = Path(sys.argv[1])
rows = [row for row in join(work) if row.metric == "answer_nll" and row.model.startswith("qwen") and 2048 <= row.length <= 8192]
ours = [row for row in rows if row.plan.startswith(("budget-0", "budget-prompt")) and row.density <= 0.26]
best = [min((row for row in ours if (row.task, row.length) == place), key=lambda row: row.value)
        for place in sorted({(row.task, row.length) for row in ours})]
worst = max(best, key=lambda row: row.paired_difference)
plans = Shelf(work / "plans" / worst.model.removesuffix(".gguf")).get(worst.length, "budget")
(plans | railed(plans))[worst.plan].save_pretrained(work / "heads" / "plans" / worst.plan)
(work / "heads" / "plan.txt").write_text(f"{worst.plan} {worst.task} {worst.length}\n")
PYTHON
}

convert() { # Kept in the cache of the user: later processes only read it.
    python3 -c "from attnsieve.hf import load_model; load_model('$1')" > "$work/convert-$(basename "$1").log" 2>&1
}

main() {
    convert "$smol" &
    convert "$qwen"
    fleet main "$each" "$seconds" pareto "$qwen" --tasks kv,longeval-lines-prefix --lengths 2048,4096,8192 --items 48,40,32 \
        --groups "$MADE" --only "$OURS,budget-guarded-0.25,budget-kv-0.25,keys-0.8,keys-0.9,keys-prompt,keys-0.95,dam-,$PUBLISHED" \
        --first "$FIRST" --railed "$RAILED" --out "$work"
}

rest() {
    fleet rest "$each" "$seconds" pareto "$qwen" --tasks kv,longeval-lines-prefix --lengths 16384,1024 --items 12,32 \
        --groups budget,profiled,chosen,fixed,phases --railed "$RAILED" --out "$work" --first keys-,budget-0.25,budget-prompt-0.2 \
        --only "$OURS,keys-0.9,keys-sparse,keys-asked,keys-by-all,keys-prompt,minference-0.9,minference-prompt-0.9,xattention-0.9,dam-,streaming-llm-0.25"
}

probing() {
    convert "$qwen"
    fleet probing "$each" "$seconds" pareto "$qwen" --tasks kv,longeval-lines-prefix --lengths 2048,4096,8192 --items 48,40,32 \
        --groups phases,thorough --only keys-by,budget-all --first keys-by-all,budget-all-0.2 --railed budget-all-0.1,budget-all-0.2 \
        --out "$work"
}

small() {
    fleet ablation 3 "$seconds" ablation "$smol" --dtype bfloat16 --length 2048 --pcls 128,256,512,1024,2048 --counts 1,2,4 \
        --documents 8 --items 8 --out "$work/ablation/ablation-smollm2.jsonl" &
    fleet small $((each - 3)) "$seconds" pareto "$smol" --tasks kv,longeval-lines-prefix --lengths 1024,2048,4096,8192 \
        --items 32,32,24,16 --groups budget,profiled,chosen,fixed --railed "$RAILED" --out "$work" --first "$FIRST" \
        --only "$OURS,keys-0.9,minference-,xattention-0.7,xattention-0.9,xattention-prompt-0.9,dam-,streaming-llm-0.25,streaming-llm-prompt"
    wait
}

tests() {
    local few=budget-0.1,budget-0.25,budget-prompt-0.2,minference-0.9,minference-prompt-0.9,streaming-llm-0.25,streaming-llm-prompt-0.25
    missed
    if [ -f "$work/heads/plan.txt" ]; then
        read -r plan task length < "$work/heads/plan.txt"
        fleet heads $((each - 4)) "$seconds" heads "$qwen" "$work/heads/plans/$plan" --task "$task" --length "$length" --items 16 \
            --out "$work/heads" &
    fi
    fleet float32 1 "$seconds" pareto "$qwen" --dtype float32 --tasks kv,longeval-lines-prefix --lengths 2048 --items 48 \
        --groups budget,chosen --only budget-0.2,budget-prompt-0.2,keys-0.9 --railed budget-0.2 --out "$work" &
    fleet needles 2 "$seconds" pareto "$qwen" --tasks needle-multikey-1,needle-single-3,passkey --lengths 2048,8192 --items 24,12 \
        --groups budget,profiled,chosen,fixed --only "$few,dam-" --railed "$RAILED" --out "$work" &
    fleet topics 1 "$seconds" pareto "$qwen" --tasks longeval-topics --lengths 4096 --items 6 --groups budget,chosen,fixed \
        --only budget-0.25,budget-prompt-0.2,minference-prompt-0.9,streaming-llm-0.25 --railed "$RAILED" --out "$work"
    wait
}

ready() { # LIST, from what is given: with the models' files; and the rows that there are.
    cp benchmarks/results/eval-spread.jsonl "$work/rows-before.jsonl"
    sed "s#QWEN#$qwen#; s#SMOLLM2#$smol#${tiny:+; s/--lengths [0-9,]*/--lengths $tiny/; s/--items [0-9,]*/--items 2/}" > "$1"
}

all() {
    ready "$work/list.txt" < benchmarks/accuracy.txt
    convert "$smol" &
    convert "$qwen"
    wait
    salvage &
    local salvaging=$!
    fleet ablation 1 "$seconds" ablation "$smol" --length "${tiny:-2048}" --pcls 2048 --documents 4 --counts 16 "${CAPTURES[@]}" \
        --out "$work/ablation/ablation-smollm2.jsonl" &
    fleet all "$each" "$seconds" worklist "$work/list.txt" --out "$work"
    kill $salvaging
    wait
}

early() {
    ready "$work/early.txt" < <(awk -v RS= '/SMOLLM2 --/' benchmarks/accuracy.txt)
    convert "$smol"
    fleet early "$each" "$seconds" worklist "$work/early.txt" --out "$work"
}

capture() {
    mkdir -p "$work/capture"
    OMP_NUM_THREADS=${THREADS:-8} python3 benchmarks/ablation.py "$smol" --length "${tiny:-2048}" --pcls "${tiny:-8192}" --documents 2 \
        --counts 4 "${CAPTURES[@]}" --seconds "$seconds" --out "$work/capture/ablation-smollm2.jsonl" > "$work/capture.log" 2>&1
}

warm() { # Before the models are there.
    fleet warm "$each" "$seconds" warm
}

"$part"
case $part in warm | early | capture) ;; *) collect ;; esac
