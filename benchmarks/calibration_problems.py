"""Synthetic calibration problems: a dense-ish stress test, a national survey, and small areas with negative incomes."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

BRACKETS = [1, 10e3, 25e3, 50e3, 75e3, 100e3, 200e3, 500e3, 1e6]


@dataclass(frozen=True)
class Given:
    """M, y and the design weights."""

    matrix: sparse.csr_array
    targets: np.ndarray
    design: np.ndarray


def stress(seed=34543, targets=2_000, households=20_000):
    """Every household adds to a tenth of the targets; weights that meet them all exist, on half of the households."""
    rng = np.random.RandomState(seed)
    values = rng.lognormal(1.5, 0.25, (targets, households))
    matrix = sparse.csr_array(values * (rng.random_sample((targets, households)) < 0.1))
    weights = np.zeros(households)
    active = rng.choice(households, households // 2, replace=False)
    weights[active] = rng.lognormal(2.0, 1.0, households // 2)
    return Given(matrix, matrix @ weights, np.ones(households))


class Rows:
    """Targets as (households, values), dropped where fewer than five households add to one."""

    def __init__(self, households):
        self.households, self.found = households, []

    def add(self, values, among=None):
        values = np.asarray(values, float)
        index = np.flatnonzero(values) if among is None else among[values[among] != 0]
        if len(index) >= 5:
            self.found.append((index, values[index]))

    def matrix(self):
        ends = np.cumsum([0, *(len(index) for index, _ in self.found)])
        index, values = (np.concatenate(part) for part in zip(*self.found, strict=True))
        return sparse.csr_array((values, index, ends), shape=(len(self.found), self.households))


def areas_of(labels, count):
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count)))


def survey(seed=0, households=100_000, states=50, districts=400, population=1.3e8, noise=0.01):
    """Households in districts in states: counts and sums by place and category, 1 % noise on the targets."""
    rng = np.random.default_rng(seed)
    n = households
    size = rng.pareto(1.2, states) + 0.5
    state_of = np.concatenate([np.arange(states), rng.choice(states, districts - states, p=size / size.sum())])
    share = rng.uniform(0.7, 1.3, districts)
    district = rng.choice(districts, n, p=share / share.sum())
    state = state_of[district]
    people = np.minimum(1 + rng.poisson(1.5, n), 8)
    kids = rng.binomial(people - 1, 0.4)
    age, tenure = rng.integers(0, 8, n), rng.choice(3, n, p=[0.62, 0.33, 0.05])
    race, school = rng.choice(5, n, p=[0.6, 0.18, 0.13, 0.06, 0.03]), rng.choice(4, n, p=[0.1, 0.4, 0.3, 0.2])

    def money_of(share, mean, spread):
        return np.where(rng.random(n) < share, rng.lognormal(mean, spread, n), 0.0)

    level = 10.7 + 0.25 * (school - 1) + rng.normal(0, 0.15, states)[state]
    money = {
        "wages": money_of(0.78, level, 0.8),
        "self": money_of(0.10, 9.8, 1.4),
        "gains": money_of(0.05, 8.5, 2.2),
        "dividends": money_of(0.12, 7.5, 1.9),
        "interest": money_of(0.25, 6.0, 1.8),
        "pension": money_of(np.where(age >= 6, 1.0, 0.06), 9.7, 0.5),
        "unemployment": money_of(0.03, 8.6, 0.7),
        "disability": money_of(0.03, 8.9, 0.4),
        "rent": np.where(tenure == 1, rng.lognormal(9.4, 0.4, n), 0.0),
    }
    money["food"] = np.where(money["wages"] + money["pension"] < 30_000, money_of(0.55, 7.9, 0.6), 0.0)
    income = sum(money[k] for k in ("wages", "self", "gains", "dividends", "interest")) + money["pension"] / 2
    money |= {"income": income, "tax": np.maximum(0, 0.22 * (income - 14_000))}
    medical = (rng.random(n) < np.where(money["food"] > 0, 0.7, 0.12)) * people
    rows, one, bracket = Rows(n), np.ones(n), np.digitize(income, BRACKETS)
    for values in (one, people, kids, medical, *money.values(), *((v > 0) for v in money.values())):
        rows.add(values)
    for b in range(10):
        for values in (one, income, money["tax"]):
            rows.add(values * (bracket == b))
    for a in range(8):
        rows.add(people * (age == a))
    for r in range(5):
        for s in range(4):
            rows.add((race == r) & (school == s))
    names = ("food", "wages", "income", "tax", "pension", "rent", "unemployment", "self", "gains")
    by_state = [one, people, kids, medical, *(money[k] for k in names), money["food"] > 0, money["pension"] > 0]
    by_state += [tenure == 0, *(people * (race == r) for r in range(4))]
    for among in areas_of(state, states):
        for values in by_state:
            rows.add(values, among)
    for among in areas_of(district, districts):
        for values in (one, people, money["food"] > 0, income, age >= 6):
            rows.add(values, among)
    design = rng.lognormal(0, 0.4, n)
    design *= population / design.sum()
    tilt = rng.normal(0, 0.35, districts)[district] + rng.normal(0, 0.2, 4)[school] + rng.normal(0, 0.15, 5)[race]
    true = design * np.exp(tilt + rng.normal(0, 0.2, 3)[tenure] + rng.normal(0, 0.2, 8)[age])
    matrix = rows.matrix()
    targets = (matrix @ (true * population / true.sum())) * (1 + noise * rng.normal(size=matrix.shape[0]))
    return Given(matrix, targets, design)


def areas(seed=0, households=30_000, count=200, noise=0.005):
    """Small areas: counts, persons, net business incomes (many negative), capital income and balances near zero."""
    rng = np.random.default_rng(seed)
    n = households
    area = rng.integers(0, count, n)
    people = 1 + rng.poisson(1.3, n)
    wages = np.where(rng.random(n) < 0.7, rng.lognormal(10.4, 0.7, n), 0.0)
    business = np.where(rng.random(n) < 0.3, rng.normal(2_000, 15_000, n), 0.0)
    capital = np.where(rng.random(n) < 0.3, rng.lognormal(7, 1.5, n) - rng.lognormal(7, 1.5, n), 0.0)
    rows = Rows(n)
    columns = [np.ones(n), people, wages, business, capital, business < 0]
    for values in columns:
        rows.add(values)
    for among in areas_of(area, count):
        for values in columns:
            rows.add(values, among)
    matrix, design = rows.matrix(), rng.lognormal(3, 0.3, n)
    true = design * np.exp(rng.normal(0, 0.3, count)[area])
    targets = matrix @ true
    return Given(matrix, targets + noise * np.abs(targets) * rng.normal(size=len(targets)), design)


PROBLEMS = {"stress": stress, "survey": survey, "areas": areas}
