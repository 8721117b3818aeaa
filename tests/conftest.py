import os

# As `engine.startup` does; torch may be imported before it here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
