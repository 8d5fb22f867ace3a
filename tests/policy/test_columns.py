from autoplace.policy import columns
from autoplace.policy.columns import FEATURES, MESSAGE_COLUMNS, NUM_FEATURES, NUM_PAIR, NUM_PAIR_MOVING


def test_the_kernels_constants_are_the_columns_of_their_names():
    for index, (name, _) in enumerate(columns.PAIR_MOVING):
        assert getattr(columns, name.upper()) == index
    for index, (name, _) in enumerate(columns.SHARED_MOVING):
        assert getattr(columns, name.upper()) == index


def test_message_columns_are_those_of_the_two_spread_groups():
    spread = [name for name, _ in (*columns.PAIR_SPREAD, *columns.CLASS_SPREAD)]
    assert [FEATURES[column][0] for column in MESSAGE_COLUMNS] == spread
    assert NUM_PAIR_MOVING < NUM_PAIR < NUM_FEATURES == len({name for name, _ in FEATURES})
