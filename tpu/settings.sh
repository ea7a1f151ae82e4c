# shellcheck shell=bash disable=SC2034
# Everything that the scripts in this folder ask of you. Edit it, or copy it and add --settings MINE.sh.

NAME=softprompt                          # of the TPU, the cluster's workload or the job: a-z, 0-9, -
COMMAND="${COMMAND:-train}"              # train; after that eval or predict, of what was trained
TRAIN=(configs/paper/xxl_int8.yaml)      # what follows `softprompt train`: the config, then KEY=VALUE ...
OUT=                                     # where the run is kept: gs://BUCKET/runs/NAME, or a folder that all machines see
EVAL=(--split test)                      # what follows `softprompt eval OUT`
PREDICT=(--input gs://BUCKET/texts.jsonl --output gs://BUCKET/predictions.jsonl) # what follows `softprompt predict OUT`

# Google Cloud: TPU VMs (tpu.sh) and GKE (gke.sh)
PROJECT=                                 # `gcloud projects list`
ZONE=us-west4-a                          # one that has the accelerator: https://cloud.google.com/tpu/docs/regions-zones
ACCELERATOR=v5litepod-1                  # `gcloud compute tpus accelerator-types list --zone=ZONE`
RUNTIME=v2-alpha-tpuv5-lite              # v5e; for others: https://cloud.google.com/tpu/docs/runtimes
SPOT=yes                                 # cheaper, may be taken away at any time (`watch` then starts again); no: on demand
QUEUE_FOR=                               # give up waiting for a TPU after, say, 6h; empty: never
SLICES=1                                 # gke.sh: so many times ACCELERATOR, as one run
IMAGE=                                   # gke.sh and kubernetes.sh: a container image made from tpu/Dockerfile

# GPUs (gpu/slurm.sh, gpu/kubernetes.sh; gpu/skypilot.yaml has its own)
NODES=1
GPUS_PER_NODE=8
PARTITION=                               # Slurm's; empty: its default
TIME_LIMIT=24:00:00                      # Slurm's; the job saves two minutes before and is queued again

POLL_S=60                                # between two looks at the state
