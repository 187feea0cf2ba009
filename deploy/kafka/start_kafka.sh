#!/usr/bin/env bash
# One-node Kafka (KRaft, broker + controller in one process) without Docker. Needs Java 17+, Maven for the first run.
#   start_kafka.sh start DATA_DIR [PORT]   idempotent: copies jars, formats, starts, waits until it answers; prints bootstrap address
#   start_kafka.sh stop  DATA_DIR          clean stop (SIGTERM)
#   start_kafka.sh kill  DATA_DIR          SIGKILL, for failure tests ("start" brings it back with its data)
#   start_kafka.sh wipe  DATA_DIR          stop and delete the data
# Env: KAFKA_HEAP (default 384m), KAFKA_OPTS (more for java), KAFKA_JARS (jar folder), KAFKA_EXTRA (file appended to server.properties)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cmd="${1:?start|stop|kill|wipe}"; data="${2:?data dir}"; port="${3:-9092}"
mkdir -p "$data"; data="$(cd "$data" && pwd)"
jars="${KAFKA_JARS:-$here/jars}"; heap="${KAFKA_HEAP:-384m}"; pidf="$data/kafka.pid"

alive() { [ -s "$pidf" ] && kill -0 "$(cat "$pidf")" 2>/dev/null && grep -qz 'kafka.Kafka' "/proc/$(cat "$pidf")/cmdline" 2>/dev/null; }
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
gone() { # process ended and its port free again (a killed JVM keeps its sockets for a moment)
  local p; p="$(sed -n 's/^listeners=PLAINTEXT:.*127.0.0.1:\([0-9]*\),CONTROLLER.*/\1/p' "$data/server.properties" | head -1)"
  for _ in $(seq 1 300); do alive || answers "$p" || { rm -f "$pidf"; return 0; }; sleep 0.1; done; return 1; }

case "$cmd" in
start)
  if alive; then echo "127.0.0.1:$port"; exit 0; fi
  # One at a time: two brokers that start together would copy the jars twice, and one read what the other has written half.
  mkdir -p "$jars"
  ( flock 9
    if [ ! -f "$jars/complete" ]; then
      mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$jars" >&2
      touch "$jars/complete"
    fi ) 9> "$jars/lock"
  ctl=$((port + 10000))
  cat > "$data/server.properties" <<P
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:$ctl
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$ctl
advertised.listeners=PLAINTEXT://127.0.0.1:$port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=PLAINTEXT
log.dirs=$data/log
auto.create.topics.enable=false
num.partitions=1
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.segment.bytes=67108864
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
P
  if [ -n "${KAFKA_EXTRA:-}" ]; then cat "$KAFKA_EXTRA" >> "$data/server.properties"; fi
  cat > "$data/log4j2.properties" <<L
rootLogger.level=${KAFKA_LOG_LEVEL:-WARN}
rootLogger.appenderRef.stdout.ref=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{HH:mm:ss.SSS} %p %c{1}: %m%n
L
  opts=(-Xms128m "-Xmx$heap" -XX:+UseSerialGC "-Dlog4j2.configurationFile=file:$data/log4j2.properties" -cp "$jars/*")
  if [ ! -f "$data/log/meta.properties" ]; then
    id="$(head -c 16 /dev/urandom | base64 | tr '+/' 'xy' | cut -c 1-22)"  # as `StorageTool random-uuid` makes one, without a JVM
    java "${opts[@]}" ${KAFKA_OPTS:-} kafka.tools.StorageTool format --standalone -t "$id" -c "$data/server.properties" ${KAFKA_FORMAT_ARGS:-} >&2
  fi
  setsid java "${opts[@]}" ${KAFKA_OPTS:-} kafka.Kafka "$data/server.properties" >> "$data/kafka.out" 2>&1 < /dev/null &
  echo $! > "$pidf"
  for _ in $(seq 1 600); do
    # Not by `alive`: in its first moment the process does not have its own command line.
    kill -0 "$(cat "$pidf")" 2>/dev/null || { echo "broker died:" >&2; tail -20 "$data/kafka.out" >&2; exit 1; }
    if answers "$port"; then echo "127.0.0.1:$port"; exit 0; fi
    sleep 0.1
  done
  echo "no answer on port $port in 60 s" >&2; tail -20 "$data/kafka.out" >&2; exit 1 ;;
stop) alive || exit 0; kill -TERM "$(cat "$pidf")"; gone ;;
kill) alive || exit 0; kill -KILL "$(cat "$pidf")"; gone ;;
wipe) if alive; then kill -KILL "$(cat "$pidf")"; gone; fi; rm -rf "$data/log" "$data/kafka.out" "$data/server.properties" "$data/log4j2.properties" ;;
*) echo "start|stop|kill|wipe" >&2; exit 2 ;;
esac
