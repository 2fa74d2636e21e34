"""A starting point for production. Every name here is a setting of Celery or of mpworker.

With it in the current folder:  CELERY_CONFIG_MODULE=celeryconfig celery -A mpworker worker
In a project of your own:       app.config_from_object("celeryconfig"), then mpworker.install(app)
"""

import os

# --- where messages and results go -----------------------------------------------------------------------------------
# RabbitMQ serves as broker too: amqp://user:password@host//
broker_url = os.environ.get("MPWORKER_BROKER_URL") or "redis://127.0.0.1:6379/0"
# `mpworker+` puts the local journal in front of Redis.
result_backend = os.environ.get("MPWORKER_RESULT_BACKEND") or "mpworker+redis://127.0.0.1:6379/1"
# A worker that comes up before its broker waits for it.
broker_connection_retry_on_startup = True
# Redis only, in seconds: a message that nobody has acknowledged by then is delivered again. Keep it longer than the
# longest task and the farthest countdown.
broker_transport_options = {"visibility_timeout": 6 * 3600}

# --- what may travel -------------------------------------------------------------------------------------------------
# Whoever can write to the broker could run any code through pickle, so JSON only.
accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"

# --- delivery --------------------------------------------------------------------------------------------------------
# Acknowledge after the task, so that a node that vanishes loses nothing. Tasks must bear to be run twice.
task_acks_late = True
# Reserve one message per free slot: a long task holds no others back.
worker_prefetch_multiplier = 1

# --- limits ----------------------------------------------------------------------------------------------------------
# Seconds. At the soft limit the task gets SoftTimeLimitExceeded and may clean up; at the hard one it is killed.
# A service manager must allow more than the hard limit for a warm shutdown (stop_grace_period, TimeoutStopSec).
task_soft_time_limit = 270
task_time_limit = 300
# Replace a worker process after so many tasks, or once a task leaves it above so many KiB.
worker_max_tasks_per_child = 1000
worker_max_memory_per_child = 500_000
# Worker processes per node. Unset: one per core. `--concurrency` on the command line wins.
# worker_concurrency = 8

# --- what can be seen ------------------------------------------------------------------------------------------------
# STARTED as a state of its own: without it PENDING means "waiting", "running" and "never heard of".
task_track_started = True
# Keep the name, the arguments and the node beside each result.
result_extended = True
# Seconds until Redis forgets a result. The journal keeps its line.
result_expires = 24 * 3600
# Events for Flower and `celery events`.
worker_send_task_events = True
task_send_sent_event = True
enable_utc = True
timezone = "UTC"

# --- mpworker (the environment wins: MPWORKER_JOURNAL and so on) -----------------------------------------------------
# Modules whose tasks this node runs.
# mpworker_include = ["proj.tasks"]
# Folder of the JSONL files; every node needs to be able to write there.
# mpworker_journal = "/var/lib/mpworker/journal"
# "always": each record is on the disk before its message is acknowledged, at the price of one fsync per task.
# "off" survives any killed process, but not a power cut.
mpworker_journal_fsync = "off"
# Seconds that one `callback` or `error_callback` may run.
mpworker_callback_time_limit = 60
# Seconds that a worker process may take to import the application.
mpworker_ready_timeout = 120
# A message that has cost so many worker processes fails and is kept (`mpworker results --dead`) instead of run again.
mpworker_max_deaths = 3
# Seconds that messages may wait beside free slots before this node's consumer is restarted, then the node ended.
mpworker_stall_timeout = 60
# KiB of what a task printed and logged that are kept with its record in the journal.
# mpworker_task_log = 64
# Environment variables of each worker process, set before it imports the application.
# mpworker_worker_env = {"CUDA_VISIBLE_DEVICES": "{slot}"}
