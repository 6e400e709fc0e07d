"""Bodies that bounce in a box, solved exactly from contact to contact (no time steps).

Lengths are in picture heights, x to the right, y down, times in seconds. All bodies fly under the same gravity, so the
motion of one against another is straight and the time of every contact has a closed form. A contact draws how much of
the speed is returned; where the next contacts would come too close together, the last draws are taken back and made
again (backtracking), so that clips of any length keep their contacts apart.
"""

import math
from dataclasses import dataclass

import numpy as np

GRAVITY = 1.8
FLOOR, LEFT, RIGHT = 0.9, 0.05, 0.95  # surfaces of the box
MIN_GAP = 0.25  # seconds between contacts, of whichever bodies
EDGE = 0.1  # seconds at both ends of a clip without contacts
MIN_SPEED = 0.15  # of a contact along its normal: slower ones could not be seen
MIN_BOUNCE = 0.65  # upward speed below which the floor throws a body up again, so that none comes to rest
FULL_SPEED = math.sqrt(2 * GRAVITY * 0.75)  # speed of the loudest contact: a fall over three quarters of the picture
RATES = 0.6, 2.0  # least and most contacts per second of a clip
MAX_DRAWS, MAX_DRAWS_EACH = 40, 10  # in all, and before one body fewer is tried
MAX_TAKEN_BACK = 60  # times per draw and 5 s


@dataclass(frozen=True)
class Flight:
    """A body from `time` on: position x, y and velocity vx, vy at that time, then ballistic."""

    time: float
    x: float
    y: float
    vx: float
    vy: float

    def at(self, time: float) -> "Flight":
        """Return the state at `time` of the same flight."""
        dt = time - self.time
        return Flight(time, self.x + self.vx * dt, self.y + (self.vy + GRAVITY / 2 * dt) * dt, self.vx,
                      self.vy + GRAVITY * dt)  # fmt: skip


@dataclass(frozen=True)
class Contact:
    """Two things touch.

    Args:
        time: seconds.
        speed: along the normal before the contact, picture heights per second.
        x, y: where.
        surface: "floor", "left", "right" or "body".
        bodies: numbers of the bodies that take part: one, or two for "body".
    """

    time: float
    speed: float
    x: float
    y: float
    surface: str
    bodies: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """What happens in a clip: radii [bodies], the flights of each body by time, and the contacts by time."""

    radii: tuple[float, ...]
    flights: tuple[tuple[Flight, ...], ...]
    contacts: tuple[Contact, ...]

    def positions(self, body: int, times: np.ndarray) -> np.ndarray:
        """Return x, y of a body at `times` [T], float64 [T, 2]; above the picture before it comes in."""
        flights = self.flights[body]
        starts = np.array([flight.time for flight in flights])
        chosen = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
        table = np.array([(f.time, f.x, f.y, f.vx, f.vy) for f in flights])[chosen]
        dt = np.clip(times - table[:, 0], 0, None)
        x = table[:, 1] + table[:, 3] * dt
        y = np.where(times < starts[0], -1.0, table[:, 2] + (table[:, 4] + GRAVITY / 2 * dt) * dt)
        return np.stack([x, y], axis=1)


def loudness(speed: float) -> float:
    """Return the level of a contact in dB below the loudest, in [-10, 0]."""
    return float(np.clip(20 * math.log10(max(speed, 1e-9) / FULL_SPEED), -10.0, 0.0))


def simulate(rng: np.random.Generator, seconds: float) -> Scene:
    """Draw a scene of 1 to 3 bodies with 0.6 to 2 contacts a second (3 to 10 in 5 s), each `MIN_GAP` from the next.

    Args:
        rng: where all draws come from.
        seconds: length of the clip.

    Raises:
        ValueError: no such scene was found, e.g. for a clip of less than a second.
    """
    least, most = max(1, round(RATES[0] * seconds)), max(1, int(RATES[1] * seconds))
    bodies = int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]))
    for draw in range(MAX_DRAWS):
        scene = _Box(rng, seconds, max(1, bodies - draw // MAX_DRAWS_EACH)).run(most)
        if scene is not None and least <= len(scene.contacts) <= most:
            return scene
    raise ValueError(f"seconds: {seconds}: no scene with {least} to {most} contacts {MIN_GAP} s apart was found")


class _Box:
    """The bodies and what has happened to them so far."""

    def __init__(self, rng: np.random.Generator, seconds: float, bodies: int) -> None:
        self.rng, self.seconds = rng, seconds
        self.radii = tuple(rng.uniform(0.07, 0.12, bodies))
        self.flights = [[self._enter(body, radius)] for body, radius in enumerate(self.radii)]
        self.contacts: list[Contact] = []

    def _enter(self, body: int, radius: float) -> Flight:
        """The first body is in the picture or about to enter, the others fall in later."""
        time = 0.0 if body == 0 else self.rng.uniform(0.3 * body, 0.9) * self.seconds
        x = self.rng.uniform(LEFT + radius, RIGHT - radius)
        y = self.rng.uniform(-radius, 0.5) if body == 0 else -radius
        vx = self.rng.uniform(MIN_SPEED, 0.35) * self.rng.choice([-1, 1])
        return Flight(float(time), float(x), float(y), float(vx), float(self.rng.uniform(0.0, 0.4)))

    def run(self, most: int) -> Scene | None:
        """Go from contact to contact to the end of the clip; None if the draws run out."""
        history = [[len(flights) for flights in self.flights]]  # before each contact, to take contacts back
        failures = 0
        while True:
            contact = self._next_contact()
            if contact.time > self.seconds:
                break
            if not self._allowed(contact) or len(self.contacts) >= most:
                failures += 1
                if failures > MAX_TAKEN_BACK * max(1.0, self.seconds / 5) or not self.contacts:
                    return None
                back = min(len(self.contacts), 1 + int(self.rng.geometric(0.5)))
                del self.contacts[-back:], history[-back:]
                for flights, length in zip(self.flights, history[-1], strict=True):
                    del flights[length:]
                if not self.contacts:
                    return None
                continue
            self.contacts.append(contact)
            self._bounce(contact)
            history.append([len(flights) for flights in self.flights])
        return Scene(self.radii, tuple(map(tuple, self.flights)), tuple(self.contacts))

    def _allowed(self, contact: Contact) -> bool:
        last = self.contacts[-1].time if self.contacts else -MIN_GAP
        in_clip = EDGE <= contact.time <= self.seconds - EDGE
        return in_clip and contact.time - last >= MIN_GAP and contact.speed >= MIN_SPEED and contact.y > 0

    def _next_contact(self) -> Contact:
        found = [contact for body in range(len(self.radii)) for contact in self._with_box(body)]
        for one in range(len(self.radii)):
            for other in range(one + 1, len(self.radii)):
                if (contact := self._with_body(one, other)) is not None:
                    found.append(contact)
        return min(found, key=lambda contact: contact.time)

    def _with_box(self, body: int) -> list[Contact]:
        flight, radius = self.flights[body][-1], self.radii[body]
        drop = FLOOR - radius - flight.y
        dt = (-flight.vy + math.sqrt(max(flight.vy**2 + 2 * GRAVITY * drop, 0.0))) / GRAVITY
        state = flight.at(flight.time + dt)
        found = [Contact(state.time, state.vy, state.x, FLOOR, "floor", (body,))]
        if flight.vx:
            surface, wall = ("right", RIGHT) if flight.vx > 0 else ("left", LEFT)
            distance = wall - math.copysign(radius, flight.vx) - flight.x
            state = flight.at(flight.time + max(distance / flight.vx, 0.0))
            found.append(Contact(state.time, abs(flight.vx), wall, state.y, surface, (body,)))
        return found

    def _with_body(self, one: int, other: int) -> Contact | None:
        """Solve |p + v t| = r1 + r2 for the straight relative motion; None if they do not meet."""
        start = max(self.flights[one][-1].time, self.flights[other][-1].time)
        a, b = self.flights[one][-1].at(start), self.flights[other][-1].at(start)
        px, py, vx, vy = b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy
        approach, speed2 = px * vx + py * vy, vx * vx + vy * vy
        reach = self.radii[one] + self.radii[other]
        gap2 = px * px + py * py - reach**2
        if gap2 < -1e-6:  # one came in where the other was: a contact that is never allowed
            return Contact(start, -1.0, a.x, a.y, "body", (one, other))
        root = approach**2 - speed2 * gap2
        if approach >= 0 or root <= 0 or speed2 == 0:
            return None
        time = start + max((-approach - math.sqrt(root)) / speed2, 0.0)
        a, b = self.flights[one][-1].at(time), self.flights[other][-1].at(time)
        nx, ny = (b.x - a.x) / reach, (b.y - a.y) / reach
        share = self.radii[one] / reach
        x, y = a.x + share * (b.x - a.x), a.y + share * (b.y - a.y)
        return Contact(time, -(vx * nx + vy * ny), x, y, "body", (one, other))

    def _bounce(self, contact: Contact) -> None:
        """Reflect the normal velocity, with a drawn loss; equal masses exchange theirs."""
        states = [self.flights[body][-1].at(contact.time) for body in contact.bodies]
        kept = self.rng.uniform(0.75, 0.95)
        if contact.surface == "body":
            a, b = states
            distance = math.hypot(b.x - a.x, b.y - a.y)
            nx, ny = (b.x - a.x) / distance, (b.y - a.y) / distance
            push = (1 + kept) / 2 * contact.speed
            velocities = [(a.vx - push * nx, a.vy - push * ny), (b.vx + push * nx, b.vy + push * ny)]
        elif contact.surface == "floor":
            up = kept * contact.speed
            if up < MIN_BOUNCE:
                up = self.rng.uniform(0.8, 0.95) * FULL_SPEED
            along = max(MIN_SPEED * 1.05, abs(states[0].vx) * self.rng.uniform(0.8, 1.1))
            velocities = [(math.copysign(along, states[0].vx), -up)]
        else:
            velocities = [(-states[0].vx * max(kept, min(1.0, MIN_SPEED * 1.05 / abs(states[0].vx))), states[0].vy)]
        for body, state, (vx, vy) in zip(contact.bodies, states, velocities, strict=True):
            self.flights[body].append(Flight(contact.time, state.x, state.y, vx, vy))
