"""The first schema."""

from alembic import op

from storage.tables import Table

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    Table.metadata.create_all(op.get_bind())
