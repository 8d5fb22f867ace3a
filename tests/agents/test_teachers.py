import numpy as np

from autoplace.agents.distribution import training_problems
from autoplace.agents.teachers import TeacherFile, search_teachers


def test_the_number_of_processes_changes_nothing():
    tasks = [(p, seed) for seed, p in enumerate(training_problems(9, seed=3, max_ops=20, max_devices=4))]
    alone, together = (list(search_teachers(tasks, evaluations=60, workers=workers)) for workers in (1, 2))
    assert len(alone) == len(together) == 9
    for problem, one, other in zip(tasks, alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == (problem[0].num_ops,)


def test_a_file_gives_back_what_was_saved_and_ignores_what_is_not_its_own(tmp_path):
    problems = training_problems(3, seed=1, max_ops=12)
    file = TeacherFile(tmp_path / "teachers.npz", {"seed": 1}, problems)
    assert file.load() == []
    file.save([np.array([0, 1, 1], np.int32), None, np.array([2], np.int32)])
    first, second, third = file.load()
    np.testing.assert_array_equal(first, [0, 1, 1])
    assert second is None and third.tolist() == [2]
    assert TeacherFile(file.path, {"seed": 2}, problems).load() == []
    assert TeacherFile(file.path, {"seed": 1}, problems[:2]).load() == []
    file.path.write_bytes(file.path.read_bytes()[:90])
    assert file.load() == []
