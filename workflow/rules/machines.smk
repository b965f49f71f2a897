# Threads, GPUs and nodes of jobs, and the number of workers.
import functools

from retort.cluster.gpus import count_threads, count_workers, detect_gpus


def get_cpu_threads(wildcards):
    """Return the threads that the config sets, since another number changes results; Snakemake may schedule fewer."""
    config = find(wildcards).config
    if "run" in wildcards.keys():
        return count_threads(config.training)
    return config.teacher.generation.cpu_threads


def get_teacher_gpus(wildcards):
    return teacher_gpus(find(wildcards).config.teacher)


def get_pruning_gpus(wildcards):
    return get_teacher_gpus(wildcards) if find(wildcards).tokens else 0


def teacher_gpus(teacher):
    return 0 if teacher.device == "cpu" else teacher.generation.gpus_per_model


def get_training_gpus(wildcards):
    """Return the number of GPUs of all nodes together."""
    training = find(wildcards).config.training
    return 0 if training.device == "cpu" else training.gpus * training.nodes


def get_evaluation_gpus(wildcards):
    return min(1, get_training_gpus(wildcards))


@functools.cache
def detected_gpus():
    """Return the GPU ids of this machine; with a broken driver none, as that is an error of the job that needs GPUs."""
    try:
        return detect_gpus()
    except ValueError as error:
        logger.warning(str(error))
        return ()


def get_num_workers(wildcards):
    """Return how many workers share a cache's parts. It changes no ids, so it may differ between machines and runs."""
    generation = find(wildcards).config.teacher.generation
    return count_workers(generation, detected=detected_gpus())


def several_nodes(resource):
    """Return a resource function for a training on several nodes of SLURM; for one node, only `nodes` is set.

    The slurm plugin lets an "mpi" job start its own step, but requires several tasks per node: here two, with half of
    the node's threads each. `gres` gives every node the same number of GPUs; a total alone may be divided unevenly.
    """

    def get_resource(wildcards, threads):
        training = find(wildcards).config.training
        if training.nodes == 1:
            return 1 if resource == "nodes" else None
        on_cpu = training.device == "cpu"
        return {
            "nodes": training.nodes,
            "gres": None if on_cpu else f"gpu:{training.gpus}",
            "mpi": "srun",
            "tasks_per_node": 2,
            "cpus_per_task": (threads + 1) // 2 if on_cpu else None,
        }[resource]

    return get_resource


SEVERAL_NODES = {
    name: several_nodes(name)
    for name in ("nodes", "gres", "mpi", "tasks_per_node", "cpus_per_task")
}


def get_srun(wildcards):
    """Return the command that starts a training once on each of several nodes, "" for one node."""
    training = find(wildcards).config.training
    if training.nodes == 1:
        return ""
    words = f"srun --nodes={training.nodes} --ntasks-per-node=1 --cpu-bind=none"
    if training.device != "cpu":
        words += f" --gres=gpu:{training.gpus}"
    return f"{words} --kill-on-bad-exit=1 --input=none"
