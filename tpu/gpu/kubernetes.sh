#!/usr/bin/env bash
# GPUs in a Kubernetes cluster that has JobSet 0.10 or newer (https://jobset.sigs.k8s.io): one process a node.
#
#   tpu/gpu/kubernetes.sh [--dry-run] [--settings FILE] run | status | logs | stop
#
# --dry-run prints the JobSet and every command and runs none.
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" "$@"
set -- ${arguments[@]+"${arguments[@]}"}

# A list of arguments as YAML: strings in double quotes, where JSON's escapes hold.
as_yaml() {
  local item listed=()
  for item in "$@"; do
    item="${item//\\/\\\\}"
    listed+=("\"${item//\"/\\\"}\"")
  done
  (IFS=,; printf '[%s]' "${listed[*]}")
}

# Any process that ends in an error ends all, and all start again from the last checkpoint: without end after 75 (told to
# go, saved) and where Kubernetes took a pod away, five times after other failures, never after 2 (bad input).
# JobSet learns of exit codes only through the message of the Job's failure, which names the rule that matched.
jobset() {
  # shellcheck disable=SC2016 # Kubernetes fills it in
  local index='$(JOB_COMPLETION_INDEX)'
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
spec:
  failurePolicy:
    maxRestarts: 5
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["rule at index 0$"]
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: nodes
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          parallelism: $NODES
          completions: $NODES
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [75]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              containers:
                - name: train
                  image: $IMAGE
                  command: [softprompt, $COMMAND]
                  args: $(as_yaml "${command[@]:1}" --coordinator "$NAME-nodes-0-0.$NAME:8476" --processes "$NODES" --process "$index")
                  ports: [{containerPort: 8476}]
                  resources:
                    limits: {nvidia.com/gpu: $GPUS_PER_NODE}
                  volumeMounts: [{name: shm, mountPath: /dev/shm}]
              volumes:
                - name: shm
                  emptyDir: {medium: Memory}
YAML
}

submit() {
  if [ "$dry_run" = yes ]; then
    echo "kubectl apply -f - <<YAML"
    jobset
    echo YAML
  else
    jobset | run kubectl apply -f -
  fi
}

program kubectl "see https://kubernetes.io/docs/tasks/tools"
need IMAGE "the image made from tpu/Dockerfile with EXTRA=cuda13"
case "${1-}" in
  run) submit ;;
  status) run kubectl get "jobset/$NAME" --output=wide ;;
  logs) run kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  stop) run kubectl delete "jobset/$NAME" ;;
  *) refuse "found ${1:-no command}; expected run, status, logs or stop; see its first lines" ;;
esac
