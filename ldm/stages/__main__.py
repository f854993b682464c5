"""`python -m ldm.stages NAME` runs a stage of dvc.yaml in the project around the working directory."""

import sys

from ldm.stages.stage import stage_main

if __name__ == "__main__":
    stage_main(*sys.argv[1:])
