"""What a ring's membership becomes when workers are lost or arrive."""

from raybsa.cluster.membership import Membership

FOUR = Membership(3, (10, 11, 12, 13))


def test_a_stand_in_takes_the_rank_that_was_lost():
    after = FOUR.after_loss({11}, [20])
    assert after == Membership(4, (10, 20, 12, 13))
    assert after.rank(20) == 1


def test_stand_ins_fill_the_lowest_ranks_and_the_rest_closes_up():
    assert FOUR.after_loss({10, 12}, [20]) == Membership(4, (20, 11, 13))
    assert FOUR.after_loss({10, 11, 12, 13}, []) == Membership(4, ())


def test_workers_that_arrive_go_behind_the_others():
    assert FOUR.grown([20]) == Membership(4, (10, 11, 12, 13, 20))
    assert FOUR.grown([]).generation == 4
