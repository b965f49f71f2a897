"""temporary"""
from contextlib import contextmanager
def detect_gpus(): return ()
def parse_groups(gpus, *, gpus_per_model, detected): return ()
def num_workers(n, groups): return n or 1
@contextmanager
def lease_teacher(generation, *, worker, say): yield ()
@contextmanager
def lease_training(count, *, say): yield ()
