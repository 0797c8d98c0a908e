"""Lets ranks share a GPU: runs a module as `python -m` does, with a GPU that every rank takes for its own.

torchrun --nproc-per-node=2 -m rank_programs.one_gpu MODULE [ARGUMENTS]

NCCL refuses two ranks of one host on the same GPU, but not of two hosts, whose ranks talk by sockets. NCCL_HOSTID says
which host a rank is on.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0"}
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
