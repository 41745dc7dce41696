"""Many prompts in one folder: planned, made by workers, complete however often that is broken off.

    task.py       Task, what a worker is given; Outcome, what it says; Resources, what it runs on
    plan.py       a file of prompts x seeds x presets -> Tasks, and which of them are done
    claims.py     a task belongs to one process, on this machine or another one
    failures.py   tasks that failed, on file with their errors
    making.py     a Task -> a job's folder, by a pipeline that is loaded once
    worker.py     Worker: claim, make, try again, write down
    engines/      who works on what: a file each
    summary.py    the figures of all tasks: summary.csv, a table
    display.py    what a person sees
    run.py        a plan, an engine -> Report
    command.py    `vidsparse batch`

An engine is a file `engines/<name>.py` with a function

    run(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]

that calls the worker, or a copy of it in another process, on every task and yields what it returns,
in any order. The worker can be pickled; each copy loads its own pipeline at its first task, on
`worker.device`, and never raises for a task. An engine that loses workers raises `Broken` after it
has yielded what it knows; it refuses with an `InputError`. An engine whose processes all run the
command also has `follows() -> bool`: whether another one speaks for this one.

A folder of a batch:

    <preset>/<job>/        a job's folder, as `vidsparse.jobs` describes it; for `vidsparse compare`
                           <preset> is an arm
    failures/<job>.json    a task that failed
    summary.csv            all tasks of the last run
    .batch/                claims
"""
