import os

from engine.startup import SPIN_COUNT

# As `start_engine` does; torch may be imported before it here.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
