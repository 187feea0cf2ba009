"""The first schema."""

import sqlalchemy as sa
from alembic import op

from storage.columns import UtcTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alarms",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("raised_at", UtcTime(), nullable=False),
        sa.Column("cleared_at", UtcTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "one_alarm_of_a_kind",
        "alarms",
        ["agent", "kind"],
        unique=True,
        sqlite_where=sa.text("cleared_at IS NULL"),
        postgresql_where=sa.text("cleared_at IS NULL"),
    )
    op.create_table(
        "aliases",
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("changed_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("agent", "alias"),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("root", sa.String(), nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("agent", "number"),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=True),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=True),
        sa.Column("topic", sa.String(), nullable=True),
        sa.Column("partition", sa.Integer(), nullable=True),
        sa.Column("record_offset", sa.BigInteger(), nullable=True),
        sa.Column("value", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("closed_at", UtcTime(), nullable=True),
        sa.Column("closed_by", sa.String(), nullable=True),
        sa.Column("note", sa.String(), nullable=True),
        sa.CheckConstraint("state = 'parked' OR state = 'replayed' OR state = 'discarded'", name="state_is_known"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "dead_letters_parked",
        "dead_letters",
        ["at"],
        unique=False,
        sqlite_where=sa.text("state = 'parked'"),
        postgresql_where=sa.text("state = 'parked'"),
    )
    op.create_index(
        "one_parked_letter_of_a_key",
        "dead_letters",
        ["key"],
        unique=True,
        sqlite_where=sa.text("state = 'parked'"),
        postgresql_where=sa.text("state = 'parked'"),
    )
    op.create_table(
        "deployments",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("previous", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("is_forced", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("requested_at", UtcTime(), nullable=False),
        sa.Column("published_at", UtcTime(), nullable=True),
        sa.Column("confirmed_at", UtcTime(), nullable=True),
        sa.Column("detail", sa.String(), nullable=True),
        sa.CheckConstraint("kind = 'promote' OR kind = 'rollback' OR kind = 'revert'", name="kind_is_known"),
        sa.CheckConstraint(
            "state = 'requested' OR state = 'confirmed' OR state = 'unverified' OR "
            "state = 'unconfirmed' OR state = 'reverted' OR state = 'superseded'",
            name="state_is_known",
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("agent", "number"),
    )
    op.create_index(
        "deployments_requested",
        "deployments",
        ["agent"],
        unique=False,
        sqlite_where=sa.text("state IN ('requested', 'unconfirmed')"),
        postgresql_where=sa.text("state IN ('requested', 'unconfirmed')"),
    )
    op.create_table(
        "events",
        sa.Column("ulid", sa.String(length=26), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("time", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("principal", sa.String(), nullable=True),
        sa.Column("data", sa.Text(), nullable=True),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("handled_at", UtcTime(), nullable=True),
        sa.Column("number", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "state = 'received' OR state = 'handled' OR state = 'waiting' OR state = 'dead' OR state = 'unsent' OR state = 'sent'",
            name="state_is_known",
        ),
        sa.PrimaryKeyConstraint("ulid"),
        sa.UniqueConstraint("source", "event_id"),
    )
    op.create_index(
        "events_received",
        "events",
        ["ulid"],
        unique=False,
        sqlite_where=sa.text("state = 'received'"),
        postgresql_where=sa.text("state = 'received'"),
    )
    op.create_index(
        "events_unsent",
        "events",
        ["number", "ulid"],
        unique=False,
        sqlite_where=sa.text("state = 'unsent'"),
        postgresql_where=sa.text("state = 'unsent'"),
    )
    op.create_index(
        "events_waiting",
        "events",
        ["subject"],
        unique=False,
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_table(
        "installation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("expires_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "ledger",
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("claim", sa.String(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index(
        "ledger_of_claim",
        "ledger",
        ["claim"],
        unique=False,
        sqlite_where=sa.text("claim IS NOT NULL"),
        postgresql_where=sa.text("claim IS NOT NULL"),
    )
    op.create_table(
        "policies",
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("agent", "version"),
    )
    op.create_table(
        "predictions",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("prediction_id", sa.String(), nullable=False),
        sa.Column("claim_id", sa.String(), nullable=False),
        sa.Column("group_key", sa.String(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("input_digest", sa.String(), nullable=False),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.Column("decision", sa.String(), nullable=True),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("probabilities", sa.JSON(), nullable=True),
        sa.Column("model_version", sa.String(), nullable=True),
        sa.Column("occurred_at", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=True),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Double(), nullable=False),
        sa.Column("effective_threshold", sa.Double(), nullable=True),
        sa.Column("inclusion_probability", sa.Double(), nullable=True),
        sa.CheckConstraint("origin = 'served' OR origin = 'import'", name="origin_is_known"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("agent", "prediction_id"),
    )
    op.create_index("predictions_of_claim", "predictions", ["claim_id"], unique=False)
    op.create_index(
        "predictions_served",
        "predictions",
        ["agent", "id"],
        unique=False,
        sqlite_where=sa.text("origin = 'served'"),
        postgresql_where=sa.text("origin = 'served'"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("exam", sa.String(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("trigger", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("dataset", sa.Integer(), nullable=True),
        sa.Column("version", sa.String(), nullable=True),
        sa.Column("folder", sa.String(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("checkpoint", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=True),
        sa.Column("heartbeat_at", UtcTime(), nullable=True),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("not_before", UtcTime(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("started_at", UtcTime(), nullable=True),
        sa.Column("finished_at", UtcTime(), nullable=True),
        sa.CheckConstraint("kind = 'train' OR kind = 'score'", name="kind_is_known"),
        sa.CheckConstraint(
            "state = 'queued' OR state = 'leased' OR state = 'running' OR "
            "state = 'done' OR state = 'failed' OR state = 'cancelled' OR state = 'parked'",
            name="state_is_known",
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "one_live_run",
        "runs",
        ["agent", "kind"],
        unique=True,
        sqlite_where=sa.text("state IN ('queued', 'leased', 'running')"),
        postgresql_where=sa.text("state IN ('queued', 'leased', 'running')"),
    )
    op.create_index("runs_of_agent", "runs", ["agent", "created_at"], unique=False)
    op.create_table(
        "streams",
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("holder"),
    )
    op.create_table(
        "tokens",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("revoked_at", UtcTime(), nullable=True),
        sa.CheckConstraint("role = 'producer' OR role = 'reviewer' OR role = 'operator'", name="role_is_known"),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("digest"),
    )
    op.create_table(
        "versions",
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("major", sa.Integer(), nullable=False),
        sa.Column("minor", sa.Integer(), nullable=False),
        sa.Column("base_path", sa.String(), nullable=False),
        sa.Column("base_digest", sa.String(), nullable=False),
        sa.Column("adapter_path", sa.String(), nullable=True),
        sa.Column("adapter_digest", sa.String(), nullable=True),
        sa.Column("tokenizer_digest", sa.String(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("prompt_form", sa.String(), nullable=False),
        sa.Column("prompt_digest", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("labels_digest", sa.String(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("parent", sa.String(), nullable=True),
        sa.Column("dataset", sa.Integer(), nullable=True),
        sa.Column("run", sa.String(), nullable=True),
        sa.Column("verdict", sa.String(), nullable=True),
        sa.Column("verdict_at", UtcTime(), nullable=True),
        sa.Column("is_forced", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.CheckConstraint("verdict IN ('promote', 'reject', 'superseded')", name="verdict_is_known"),
        sa.PrimaryKeyConstraint("agent", "name"),
        sa.UniqueConstraint("agent", "major", "minor"),
    )
    op.create_table(
        "exams",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("candidate", sa.String(), nullable=False),
        sa.Column("champion", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("opened_at", UtcTime(), nullable=False),
        sa.Column("closed_at", UtcTime(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.CheckConstraint("kind = 'exam' OR kind = 'watch'", name="kind_is_known"),
        sa.CheckConstraint("state = 'open' OR state = 'closed'", name="state_is_known"),
        sa.ForeignKeyConstraint(
            ["agent", "candidate"],
            ["versions.agent", "versions.name"],
        ),
        sa.ForeignKeyConstraint(
            ["agent", "champion"],
            ["versions.agent", "versions.name"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "one_open_exam",
        "exams",
        ["agent", "kind"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "scores",
        sa.Column("prediction", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("probabilities", sa.JSON(), nullable=False),
        sa.Column("scored_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prediction"],
            ["predictions.id"],
        ),
        sa.PrimaryKeyConstraint("prediction", "agent", "version"),
    )
    op.create_index("scores_of_version", "scores", ["agent", "version", "prediction"], unique=False)
    op.create_table(
        "reviews",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("prediction", sa.String(length=26), nullable=False),
        sa.Column("claim_id", sa.String(), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Double(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("is_blind", sa.Boolean(), nullable=False),
        sa.Column("exam", sa.String(length=26), nullable=True),
        sa.Column("opened_at", UtcTime(), nullable=False),
        sa.Column("expires_at", UtcTime(), nullable=True),
        sa.Column("leased_by", sa.String(), nullable=True),
        sa.Column("lease_until", UtcTime(), nullable=True),
        sa.Column("closed_at", UtcTime(), nullable=True),
        sa.Column("case_key", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(state = 'leased') = (leased_by IS NOT NULL)", name="a_lease_has_a_holder"),
        sa.CheckConstraint("state = 'open' OR state = 'leased' OR state = 'answered' OR state = 'expired'", name="state_is_known"),
        sa.ForeignKeyConstraint(
            ["exam"],
            ["exams.id"],
        ),
        sa.ForeignKeyConstraint(
            ["prediction"],
            ["predictions.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "one_live_review",
        "reviews",
        ["prediction"],
        unique=True,
        sqlite_where=sa.text("state IN ('open', 'leased')"),
        postgresql_where=sa.text("state IN ('open', 'leased')"),
    )
    op.create_index(
        "one_live_review_of_a_case",
        "reviews",
        ["claim_id", "case_key"],
        unique=True,
        sqlite_where=sa.text("state IN ('open', 'leased') AND exam IS NULL"),
        postgresql_where=sa.text("state IN ('open', 'leased') AND exam IS NULL"),
    )
    op.create_index(
        "reviews_live",
        "reviews",
        ["agent", sa.text("priority DESC"), "opened_at"],
        unique=False,
        sqlite_where=sa.text("state IN ('open', 'leased')"),
        postgresql_where=sa.text("state IN ('open', 'leased')"),
    )
    op.create_index(
        "reviews_of_exam",
        "reviews",
        ["exam"],
        unique=False,
        sqlite_where=sa.text("exam IS NOT NULL"),
        postgresql_where=sa.text("exam IS NOT NULL"),
    )
    op.create_index(
        "reviews_leased",
        "reviews",
        ["lease_until"],
        unique=False,
        sqlite_where=sa.text("state = 'leased'"),
        postgresql_where=sa.text("state = 'leased'"),
    )
    op.create_index(
        "reviews_expiring",
        "reviews",
        ["expires_at"],
        unique=False,
        sqlite_where=sa.text("state = 'open' AND expires_at IS NOT NULL"),
        postgresql_where=sa.text("state = 'open' AND expires_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_reviews_prediction"), "reviews", ["prediction"], unique=False)
    op.create_index("reviews_opened", "reviews", ["agent", "opened_at"], unique=False)
    op.create_table(
        "labels",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("claim_id", sa.String(), nullable=False),
        sa.Column("prediction", sa.String(length=26), nullable=False),
        sa.Column("review", sa.String(length=26), nullable=True),
        sa.Column("expert", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("rationale", sa.Text(), nullable=True),
        sa.Column("seconds_spent", sa.Double(), nullable=True),
        sa.Column("answered_at", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("superseded_by", sa.String(), nullable=True),
        sa.Column("dataset", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "kind = 'review' OR kind = 'second_read' OR kind = 'adjudication' OR kind = 'late_truth' OR kind = 'import'",
            name="kind_is_known",
        ),
        sa.ForeignKeyConstraint(
            ["prediction"],
            ["predictions.id"],
        ),
        sa.ForeignKeyConstraint(
            ["review"],
            ["reviews.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_labels_prediction"), "labels", ["prediction"], unique=False)
    op.create_index(
        "labels_fresh",
        "labels",
        ["agent", "answered_at"],
        unique=False,
        sqlite_where=sa.text("dataset IS NULL"),
        postgresql_where=sa.text("dataset IS NULL"),
    )
    op.create_index("labels_of_claim", "labels", ["agent", "claim_id"], unique=False)
    op.create_index(
        "labels_read",
        "labels",
        ["agent", "claim_id", "answer"],
        unique=False,
        sqlite_where=sa.text("superseded_by IS NULL AND kind IN ('review', 'second_read')"),
        postgresql_where=sa.text("superseded_by IS NULL AND kind IN ('review', 'second_read')"),
    )
    op.create_table(
        "review_steps",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("review", sa.String(length=26), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("note", sa.String(), nullable=True),
        sa.Column("is_unsent", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["review"],
            ["reviews.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_review_steps_review"), "review_steps", ["review"], unique=False)
    op.create_index(
        "review_steps_skipped",
        "review_steps",
        ["actor", "review"],
        unique=False,
        sqlite_where=sa.text("action = 'skipped'"),
        postgresql_where=sa.text("action = 'skipped'"),
    )
    op.create_index(
        "review_steps_unsent",
        "review_steps",
        ["id"],
        unique=False,
        sqlite_where=sa.text("is_unsent"),
        postgresql_where=sa.text("is_unsent"),
    )
