# Sourced by common.sh: how a job ends, and whether it is started again. Every way out prints, as the last line of the
# log, "job ended: " and why. (Not where the node dies, or Slurm kills this shell with SIGKILL: then it is the log that ends.)
#
#   status 0     done
#   status 2, or a line "error: ..." of a tool: refused in words; starting again would change nothing (but for a hang)
#   status 75    the tasks were asked to stop and saved (megatron_ledom/train/lifecycle.py): started again
#   others       a failure: started again, unless it is the MAX_FAILURES-th without progress
# shellcheck shell=bash disable=SC2154  # variables of common.sh

say() { echo "$(date -u +%FT%TZ) job $job: $*"; }
progress() { :; }
job_field() { scontrol show job --oneliner "$job" 2>/dev/null | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2-; }

ended=""
end_with() { # STATUS WHY...
  ended=yes
  say "job ended: ${*:2}"
  exit "$1"
}
refuse() { end_with 2 "$*"; }
# Of this shell alone: a child that a signal hits before its exec runs the trap, too, while this shell goes on.
unforeseen() { # STATUS COMMAND
  [ "$BASHPID" = $$ ] && [ -z "$ended" ] && [ "${DRY_RUN:-0}" != 1 ] || return 0
  say "job ended: a command of the batch script itself failed (status $1): $2"
}
trap 'unforeseen $? "$BASH_COMMAND"' EXIT

log="" log_start=0 # where this start's part of the log begins: a job that is started again appends
if [ "$job" != 0 ]; then
  log=$(job_field StdOut) || true
  log_start=$(stat -c %s "$log" 2>/dev/null) || log_start=0
fi

# The first line of this start's log in which a tool says "error: ", else the last in which Python names an exception.
last_error() {
  local found
  found=$(tail -c "+$((log_start + 1))" "$log" 2>/dev/null | sed 's/^\[rank [0-9]*\] //' |
    grep -E '^(error|[A-Za-z_.]*(Error|Exception)): ' | cut -c -400) || true
  grep -m 1 '^error: ' <<<"$found" || tail -n 1 <<<"$found"
}

# end_job [NODES]: the step ended with `status`; NODES are to be left out of the next start.
end_job() {
  local failures=0 idle=0 before="" now reason error nodes=${1:-} preempted
  if [ "${DRY_RUN:-0}" = 1 ]; then exit 0; fi
  now=$(progress)
  [ "$status" != 0 ] || { rm -f "$state_file"; end_with 0 "done${now:+ ($now)}"; }
  trap '' USR1 # it has been heard
  if [ -f "$state_file" ]; then { read -r failures idle; IFS= read -r before || true; } <"$state_file"; fi
  [ "$now" = "$before" ] || failures=0 idle=0
  preempted=$(job_field PreemptTime) || true
  case ${preempted:-None} in None | Unknown) ;; *) stopped_by=${stopped_by:-SIGTERM of a preemption} ;; esac
  error=$(last_error)
  if [ -n "$nodes" ]; then
    failures=$((failures + 1)) reason="bad nodes: $nodes"
  elif [ "$status" = 75 ] || [ -n "$stopped_by" ]; then
    idle=$((idle + 1)) reason="stopped by ${stopped_by:-a signal to the tasks}${now:+ ($now)}"
  elif [ "$status" = 2 ] || [[ $error == "error: "* && $error != "error: hang: "* ]]; then
    end_with 2 "refused: $error"
  else
    failures=$((failures + 1)) reason="failure $failures of $MAX_FAILURES without progress, status $status${error:+, $error}"
  fi
  mkdir -p "${state_file%/*}"
  printf '%s %s\n%s\n' "$failures" "$idle" "$now" >"$state_file"
  if [ "$failures" -ge "$MAX_FAILURES" ]; then give_up "$reason; not started again"; fi
  if [ "$idle" -gt "$MAX_IDLE_STARTS" ]; then give_up "$reason; $idle stops without progress: is the time limit too short?"; fi
  if [ "$REQUEUE" != 1 ]; then give_up "$reason; not started again, as REQUEUE=$REQUEUE asks"; fi
  requeue "$reason" "$nodes"
}

give_up() {
  rm -f "$state_file"
  end_with $((status ? status : 1)) "$1"
}

# Put the job back into the queue and stay until Slurm takes this shell down, so that our line is the last one.
requeue() {
  local state excluded reason="$1${2:+; started again without $2}"
  state=$(job_field JobState) || true
  if [ "$state" != RUNNING ]; then # scancel, or a preemption that requeues by itself: not ours to resurrect
    end_with "$status" "$1; its state is ${state:-unknown}, so it is not started again from here"
  fi
  trap 'end_with 0 "$reason; requeued (restart $((restarts + 1)))"' TERM
  (
    trap '' TERM # all of the job gets one when it is requeued
    if [ -n "$2" ]; then
      excluded=$(job_field ExcNodeList)
      [ "$excluded" != "(null)" ] || excluded=""
      scontrol requeuehold "$job"
      scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$2"
      scontrol release "$job"
    else
      scontrol requeue "$job"
    fi
  ) || end_with "$status" "$1; scontrol could not requeue it: submit it again"
  sleep 60 &
  wait $! || true
  end_with "$status" "$1; requeued, but still here after a minute"
}
