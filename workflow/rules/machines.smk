# What a job runs on: threads, GPUs, nodes, and how many workers there are.
import functools

from retort.cluster.gpus import count_workers, detect_gpus


def get_cpu_threads(wildcards):
    """The threads that the config fixes (another number changes bits); Snakemake may run fewer at once."""
    found = artefact(wildcards)
    is_run = hasattr(found, "evaluation_id")
    if not is_run:
        return found.config.teacher.generation.cpu_threads
    training = found.config.training
    ranks = training.gpus if training.device == "cpu" else 1
    return training.cpu_threads * ranks


def get_teacher_gpus(wildcards):
    return teacher_gpus(artefact(wildcards).config.teacher)


def teacher_gpus(teacher):
    return 0 if teacher.device == "cpu" else teacher.generation.gpus_per_model


def get_synthesis_gpus(wildcards):
    return teacher_gpus(PROJECT.syntheses[wildcards.synthesis].config.teacher)


def get_synthesis_threads(wildcards):
    return PROJECT.syntheses[wildcards.synthesis].config.teacher.generation.cpu_threads


def get_training_gpus(wildcards):
    """The GPUs of all nodes together."""
    training = PROJECT.runs[wildcards.run].config.training
    return 0 if training.device == "cpu" else training.gpus * training.nodes


def get_evaluation_gpus(wildcards):
    return min(1, get_training_gpus(wildcards))


def get_benchmark_teacher_gpus(wildcards):
    return teacher_gpus(get_benchmark(wildcards).config.teacher)


def get_benchmark_teacher_threads(wildcards):
    return get_benchmark(wildcards).config.teacher.generation.cpu_threads


@functools.cache
def detected_gpus():
    """The GPUs of the machine that reads the config; a broken driver is an error of the job that needs it."""
    try:
        return detect_gpus()
    except ValueError as error:
        logger.warning(str(error))
        return ()


def get_num_workers(wildcards):
    """How many workers share a cache's parts. It names nothing, so it may differ between machines and runs."""
    generation = PROJECT.logits[wildcards.logits].config.teacher.generation
    return count_workers(generation, detected=detected_gpus())


def several_nodes(resource):
    """A resource function by which SLURM gives a training several nodes; but for their number unset where one is enough.

    The slurm plugin lets a job that is "mpi" start its own step, and wants several tasks on a node of it: two, with half
    of a node's threads each. `gres` gives every node as many GPUs as the next; a sum alone may be dealt unevenly.
    """

    def get_resource(wildcards, threads):
        training = PROJECT.runs[wildcards.run].config.training
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
    """What starts a training once on each of several nodes; nothing for one."""
    training = PROJECT.runs[wildcards.run].config.training
    if training.nodes == 1:
        return ""
    words = f"srun --nodes={training.nodes} --ntasks-per-node=1 --cpu-bind=none"
    if training.device != "cpu":
        words += f" --gres=gpu:{training.gpus}"
    return f"{words} --kill-on-bad-exit=1 --input=none"
