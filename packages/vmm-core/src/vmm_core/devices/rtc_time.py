"""Dates and times in the form of an MC146818A's registers (data sheet, table 4): BCD or binary, 12 or 24 hours.

Seconds count from 1970-01-01 00:00 UTC and may be negative; every day has 86,400. A guest may write any byte into any register:
what is no time becomes the nearest one. Not here: clocks, and who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
_BINARY, _24_HOURS = 0x04, 0x02  # register B
_PM = 0x80
_ANY = 0xC0  # an alarm register with both bits set matches every value

DAY = 86_400


def days_of(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar. A day beyond its month's end runs into the next."""
    # Years that begin in March have the leap day at their end, so day numbers within them are the same every year.
    year -= month <= 2
    month = (month + 9) % 12
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1 - 719_468


FIRST, LAST = days_of(0, 1, 1) * DAY, days_of(10_000, 1, 1) * DAY - 1  # what four digits can say


class Moment(NamedTuple):
    """A date and a time."""

    year: int
    month: int
    day: int
    weekday: int  # 1 is Sunday
    hour: int
    minute: int
    second: int

    @classmethod
    def of(cls, seconds: int) -> Moment:
        """Return the moment `seconds` after 1970."""
        days, rest = divmod(seconds, DAY)
        eras, of_era = divmod(days + 719_468, 146_097)  # 400 years
        year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
        of_year = of_era - (365 * year + year // 4 - year // 100)
        month = (5 * of_year + 2) // 153
        day = of_year - (153 * month + 2) // 5 + 1
        month = month + 3 if month < 10 else month - 9
        return cls(400 * eras + year + (month <= 2), month, day, (days + 4) % 7 + 1, rest // 3600, rest // 60 % 60, rest % 60)

    def register(self, index: int, b: int) -> int:
        """Return what time register `index` shows under register B = `b`."""
        if index == _HOURS:
            return to_hour(self.hour, b)
        value = {
            _SECONDS: self.second,
            _MINUTES: self.minute,
            _WEEKDAY: self.weekday,
            _DAY: self.day,
            _MONTH: self.month,
            _YEAR: self.year % 100,
            _CENTURY: self.year // 100 % 100,
        }[index]
        return value if b & _BINARY else to_bcd(value)


def to_bcd(value: int) -> int:
    """Return 0 to 99 as two decimal digits."""
    return value // 10 << 4 | value % 10


def to_hour(hour: int, b: int) -> int:
    """Return 0 to 23 as the hours register shows it."""
    if b & _24_HOURS:
        return hour if b & _BINARY else to_bcd(hour)
    twelve = (hour + 11) % 12 + 1
    return (twelve if b & _BINARY else to_bcd(twelve)) | (_PM if hour >= 12 else 0)


def from_number(value: int, b: int) -> int:
    """Return the number in a register: 0 to 255, whatever the digits."""
    return value if b & _BINARY else (value >> 4) * 10 + (value & 0xF)


def from_hour(value: int, b: int) -> int:
    """Return the hour in the hours register: 0 to 23, or more when it is none."""
    if b & _24_HOURS:
        return from_number(value, b)
    hour = from_number(value & ~_PM, b)
    return hour % 12 + (12 if value & _PM else 0) if 1 <= hour <= 12 else 24


def from_registers(cells: Mapping[int, int], b: int) -> int:
    """Return the seconds since 1970 that the time registers say; the day of the week is not looked at."""

    def clamped(index: int, low: int, high: int) -> int:
        return max(low, min(high, from_number(cells[index], b)))

    year = 100 * clamped(_CENTURY, 0, 99) + clamped(_YEAR, 0, 99)
    days = days_of(year, clamped(_MONTH, 1, 12), clamped(_DAY, 1, 31))
    hour = min(23, from_hour(cells[_HOURS], b))
    return min(LAST, days * DAY + hour * 3600 + clamped(_MINUTES, 0, 59) * 60 + clamped(_SECONDS, 0, 59))


def next_match(after: int, hours: int, minutes: int, seconds: int, b: int) -> int | None:
    """Return the first second later than `after` that the alarm registers match; None when they match none."""

    def choices(value: int, number: int, limit: int) -> range:
        if value & _ANY == _ANY:
            return range(limit)
        return range(number, number + 1) if number < limit else range(0)

    midnight = after // DAY * DAY
    for day in (midnight, midnight + DAY):
        for hour in choices(hours, from_hour(hours, b), 24):
            if day + hour * 3600 + 3599 <= after:
                continue
            for minute in choices(minutes, from_number(minutes, b), 60):
                if day + hour * 3600 + minute * 60 + 59 <= after:
                    continue
                for second in choices(seconds, from_number(seconds, b), 60):
                    found = day + hour * 3600 + minute * 60 + second
                    if found > after:
                        return found
    return None
