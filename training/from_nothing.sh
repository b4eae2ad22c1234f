#!/bin/bash
# The small world's transformer from nothing, in a given time: its judge, the transformer, and the evaluation of both.
#
#   setsid training/from_nothing.sh STATE KEEP >training.log 2>&1 &
#
# STATE gets the model and all else. KEEP gets what is worth carrying away, in parts of 15 MiB at most, whole sets only:
# the transformer's weights every KEEP_EVERY_S seconds, at the end the model and the logs too. To go on from them:
#   cat KEEP/transformer.pt.? >STATE/transformer.pt
set -u
total_s=${TOTAL_S:-1560}            # of everything
judge=${JUDGE_MINUTES:-3.5}         # of the judge's training, beside which the transformer's clips are made
evaluation_s=${EVALUATION_S:-180}   # what is left when the transformer's training ends
keep_every_s=${KEEP_EVERY_S:-120}
gpus=${GPUS:-2} python=${PYTHON:-python3}
options=${OPTIONS:-}                # of tiny_wan.py, such as --smoke
evaluate=${EVALUATE:---device cuda} # options of evaluate.py

state=$(mkdir -p "$1" && cd "$1" && pwd) keep=$(mkdir -p "$2" && cd "$2" && pwd)
end=$(($(date +%s) + total_s))
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

log() { echo "$((end - $(date +%s))) s left: $*"; }

train() { # STAGE OPTIONS...
  # shellcheck disable=SC2086
  timeout "$((end - $(date +%s)))" \
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" training/tiny_wan.py \
    --output "$state/model" --state "$state" --compact $options --stage "$@"
}

keep() { # NAME FILE
  [ -s "$2" ] || return 0
  rm -rf "$state/parts" && mkdir "$state/parts" || return
  split -b 15M -d -a 1 "$2" "$state/parts/$1." && rm -f "$keep/$1".? && mv "$state/parts/"* "$keep/"
}

mkdir -p "$state/model"
[ -d "$state/model/vae" ] || cp -r training/world_vae "$state/model/vae"

train judge --minutes "$judge" >"$state/judge.log" 2>&1 &
judge_pid=$!
# The judge's first steps: the renderer is compiled, and what renders next finds that in the cache.
while kill -0 "$judge_pid" 2>/dev/null && ! grep -q "judge step" "$state/judge.log"; do sleep 1; done
log "the judge learns"

(while sleep "$keep_every_s"; do keep transformer.pt "$state/transformer.compact.pt"; done) &
keep_pid=$!
transformer() {
  train text_and_transformer --end "$((end - evaluation_s))" "$@" >>"$state/transformer.log" 2>&1
}
transformer || { log "the transformer failed; again, without graphs" && transformer --no-graphs; }
log "the transformer ended with $?: $(grep step "$state/transformer.log" | tail -n 1)"
wait "$judge_pid"
log "the judge ended with $?: $(grep step "$state/judge.log" | tail -n 1)"
kill "$keep_pid"
wait "$keep_pid" 2>/dev/null
keep judge.pt "$state/judge.pt"
keep transformer.pt "$state/transformer.pt"
tar -C "$state" -czf "$state/model.tar.gz" model && keep model.tar.gz "$state/model.tar.gz"

# shellcheck disable=SC2086
timeout "$((end - $(date +%s)))" "$python" training/evaluate.py --model "$state/model" --judge "$state" $evaluate \
  --json "$state/results.json" >"$state/evaluation.log" 2>&1
log "the evaluation ended with $?: $(tail -n 1 "$state/evaluation.log")"
(cd "$state" && tar -czf "$keep/logs.tar.gz" ./*.log $([ -f results.json ] && echo results.json))
