#!/usr/bin/env bash
# TPUs in a GKE cluster, through xpk: for several slices, or where TPU VMs are not to be had.
#
#   tpu/gke.sh [--dry-run] [--settings FILE] COMMAND
#
#   image     build the container image of this checkout and push it to IMAGE
#   create    a cluster with SLICES x ACCELERATOR
#   run       start the run; it is started again after a preemption, ten times at most
#   status    list the cluster's runs
#   logs      follow the first worker's output
#   stop      end the run; `run` goes on from its last checkpoint
#   delete    delete the cluster: what costs money ends here
#
# --dry-run prints every command and runs none.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
set -- ${arguments[@]+"${arguments[@]}"}

cluster() { run xpk "$@" "--cluster=$NAME" "--project=$PROJECT" "--zone=$ZONE"; }

image() {
  run docker build --file "$root/tpu/Dockerfile" --build-arg EXTRA=tpu --tag "$IMAGE" "$root"
  run docker push "$IMAGE"
}

create() {
  local capacity=--on-demand
  [ "$SPOT" != yes ] || capacity=--spot
  cluster cluster create "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" "$capacity"
}

# xpk starts again after 42 and 127 to 255 by itself; 75 is a run that was told to go and has saved, 1 one whose
# neighbour was, or a defect. 2, bad input, ends it. xpk counts preemptions and failures together, so the limit is low:
# a defect must not bill on.
start() {
  cluster workload create "--workload=$NAME" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" \
    "--docker-image=$IMAGE" --max-restarts=10 --restart-on-exit-codes=1,75 \
    "--command=$(quoted softprompt "${command[@]}")"
}

case "${1-}" in
  image) program docker "see https://docs.docker.com/engine/install" ;;
  logs) program kubectl "see https://kubernetes.io/docs/tasks/tools" ;;
  *)
    program xpk "pip install xpk, see https://github.com/AI-Hypercomputer/xpk"
    program gcloud "xpk calls it; see https://cloud.google.com/sdk/docs/install"
    program kubectl "xpk calls it; see https://kubernetes.io/docs/tasks/tools"
    ;;
esac
need PROJECT "a Google Cloud project" ZONE "a zone" ACCELERATOR "an accelerator type" \
  IMAGE "a place for the image, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/softprompt"
[[ "$OUT" == gs://* ]] || refuse "$settings: OUT is $OUT; expected gs://BUCKET/FOLDER; a container's disk ends with it"
case "${1-}" in
  image | create) "$1" ;;
  run) start ;;
  status) cluster workload list ;;
  logs) run kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  stop) cluster workload delete "--workload=$NAME" ;;
  delete) cluster cluster delete ;;
  *) refuse "found ${1:-no command}; expected image, create, run, status, logs, stop or delete; see its first lines" ;;
esac
