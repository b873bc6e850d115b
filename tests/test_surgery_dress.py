"""A dressed module behaves otherwise, and is in everything else the module that it was."""

import copy
import pickle

import torch
from torch import nn

from bnlight.surgery.dress import Dress, dress, plain_class, undress, worn


class Double(Dress):
    def forward(self, x):
        return 2 * super().forward(x)


class AddOne(Dress):
    def forward(self, x):
        return 1 + super().forward(x)


def test_a_dress_changes_the_behaviour_and_nothing_else():
    layer = nn.Linear(2, 2)
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))
    weight, keys, x = layer.weight, list(layer.state_dict()), torch.ones(1, 2)
    before, shown = layer(x), repr(layer)
    dress(layer, Double)
    dress(layer, Double)
    assert torch.equal(layer(x), 2 * before)
    assert isinstance(layer, nn.Linear)
    assert (layer.weight is weight, list(layer.state_dict()), repr(layer)) == (True, keys, shown)
    undress(layer, Double)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), before)
    assert len(called) == 3


def test_dresses_are_worn_over_each_other_and_taken_off_in_any_order():
    layer = nn.Identity()
    dress(layer, Double)
    dress(layer, AddOne)
    assert layer(3) == 7
    assert worn(layer) == (AddOne, Double)
    undress(layer, Double)
    assert layer(3) == 4
    assert plain_class(layer) is nn.Identity
    undress(layer, AddOne)
    assert type(layer) is nn.Identity


def test_a_dressed_module_is_copied_and_pickled_with_its_dress():
    layer = nn.Linear(2, 2)
    dress(layer, Double)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.weight is not layer.weight
        x = torch.ones(1, 2)
        assert torch.equal(twin(x), layer(x))


def test_a_lazy_module_keeps_its_dress_when_it_becomes_what_it_will_be():
    layer = nn.LazyLinear(2)
    dress(layer, Double)
    x = torch.ones(1, 3)
    y = layer(x)
    assert isinstance(layer, nn.Linear)
    assert worn(layer) == (Double,)
    undress(layer, Double)
    assert type(layer) is nn.Linear
    assert torch.equal(y, 2 * layer(x))


def test_a_dress_may_be_put_over_another_class_and_still_gives_back_the_modules_own():
    class Quiet(Dress):
        @classmethod
        def over(cls, plain):
            return (nn.Identity,)

    layer = nn.Dropout(0.5)
    dress(layer, Double)
    dress(layer, Quiet)
    for twin in (layer, copy.deepcopy(layer)):
        assert not isinstance(twin, nn.Dropout)
        assert plain_class(twin) is nn.Dropout
        assert twin(3) == 6
    undress(layer, Quiet)
    undress(layer, Double)
    undress(layer, Double)  # never dressed so
    assert type(layer) is nn.Dropout
