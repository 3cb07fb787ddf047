"""Expressions of the native template engine against jinja2, one by one."""

from __future__ import annotations

import pytest

from support.jinja_oracle import (
    UNSUPPORTED,
    VARIABLES,
    frozen_time,
    oracle,
    ours,
)

pytestmark = pytest.mark.usefixtures(frozen_time.__name__)


EXPRESSIONS = """
1 + 2 * 3 - 4 / 5
7 // 2
-7 // 2
7 % 3
-7 % 3
7.5 // 2
-7.5 % 2
2 ** 10
2 ** -1
2 ** 3 ** 2
-2 ** 2
-n|abs
(-n)|abs
1.0
1.5e3
1e20
1e16
123456789012345678.0
0.1 + 0.2
1 / 3
100000 * 1.0
1_000 + 0x1F + 0b101 + 0o17
1 / 0
1 % 0
1.0 // 0
'a' + 'b'
'a' + 1
'a' * 3
3 * 'ab'
[1] * 2 + [3]
(1,) + (2, 3)
(1, 2)
()
(1,)
[]
{}
{'a': 1, 2: 'b', None: true, 1.5: none}
[1, 'a', 2.0, none, true, [2], (3,), {'k': 'v'}]
'it\\'s'
["it's"]
['"']
['\\'"']
['\\n\\t\\x07é\\u2028']
'\\x41\\u00e9\\101\\q\\\\'
"\\é"
1 == 1.0
1 == true
'1' == 1
none == none
missing == missing
missing == none
missing != 1
[1, 2] == [1, 2]
[1, 2] == (1, 2)
{'a': 1} == {'a': 1.0}
1 < 2 < 3
1 < 3 < 2
3 > 2 >= 2
'a' < 'b'
'a' < 1
[1, 2] < [1, 3]
(1, 2) <= (1, 2, 3)
none < 1
true + true
true < 2
not true
not missing
not not 'x'
true and 'x'
false and 1 / 0
'' or 'y'
1 or 1 / 0
none or missing or 0
1 if true else 2
1 if false
(1 if false) is defined
'a' if no else 'b' if yes else 'c'
'x' in 'xyz'
'q' not in 'xyz'
1 in [1, 2]
'a' in d
'a' in missing
1 in 'abc'
'a' in 5
'a' in none
1 ~ 2 ~ 'x' ~ none ~ [1]
1 ~ 2 + 3
'a' 'b' "c"
s[0] ~ s[-1] ~ s[100]
s[1:4] ~ s[:-2] ~ s[::2] ~ s[::-1] ~ s[5:2]
nums[1:] ~ nums[-2:] ~ nums[::-1]
nums[none:2]
nums['a']
nums[1.0]
nums[true]
pair[0] ~ pair.1
pair[5]
d.a ~ d['b'] ~ d.C[1]
d.missing
d.missing.more
d['missing']['more']
d.items
d.items() | list
d.keys() | list
d.values() | list
d.keys()
d.values()
d.items()
d.get('a') ~ d.get('zz') ~ d.get('zz', 4)
d.get()
d.copy()
d.update({'x': 1})
d.pop('a')
d.update
words.append(1)
words.index('c') ~ words.count('a')
words.index('q')
nested.x.y[0].z
nested.x.y.0.z
nested['x']['y'][0]['z']
missing
missing.attr
missing['x']
missing()
missing + 1
missing | default('dflt')
missing.x | default('dflt')
missing is defined
d.zz is defined
d.zz is undefined
none | default('x')
none | default('x', true)
'' | d('x', boolean=true)
s.upper() ~ s.lower() ~ s.title() ~ s.capitalize() ~ s.swapcase()
u.upper() ~ u.lower() ~ u.title() ~ u.capitalize() ~ u.swapcase()
u | upper ~ u | lower ~ u | title ~ u | capitalize
'ΑΣ'.lower() ~ 'ΑΣΑ'.lower() ~ 'Σ'.lower() ~ 'ΑΣ.'.lower()
'foo bar-baz (qux) o\\'neil' | title
'foo bar o\\'neil'.title()
t.strip() ~ '|' ~ t.lstrip() ~ '|' ~ t.rstrip() ~ '|'
'xxhixx'.strip('x') ~ 'abcba'.lstrip('ab') ~ 'abc'.rstrip('cb')
'a,b,,c'.split(',') ~ 'a b  c'.split() ~ 'a b c'.split(' ', 1) ~ 'a,b,c'.rsplit(',', 1)
' a  b '.split(none, 1)
' a  b c '.rsplit(none, 1)
'abc'.split('')
'a\\nb\\r\\nc\\u2028d'.splitlines()
'a\\nb\\n'.splitlines(true)
'a-b-c'.replace('-', '+') ~ 'aaa'.replace('a', 'b', 2) ~ 'abc'.replace('', '.')
s.startswith('Hell') ~ s.endswith(('x', 'ld')) ~ s.startswith('ello', 1)
s.find('o') ~ s.rfind('o') ~ s.find('zz') ~ s.index('W') ~ s.count('l')
s.find('o', 5) ~ s.find('o', -3) ~ s.count('l', 3, -1) ~ ''.find('', 1) ~ 'abc'.find('', 3)
s.index('zz')
'é日本'.find('本') ~ 'é日本'[1] ~ 'é日本'|length ~ 'é日本'[::-1]
','.join(['a', 'b']) ~ '-'.join('xyz')
','.join([1])
'abc'.partition('b') ~ 'abc'.rpartition('z')
'7'.zfill(3) ~ '-7'.zfill(4) ~ 'x'.center(4, '*') ~ 'x'.ljust(3) ~ 'x'.rjust(3, '.') ~ 'ab'.center(5, '-')
'abc'.removeprefix('a') ~ 'abc'.removesuffix('c')
'abc'.isalpha() ~ '12'.isdigit() ~ ' '.isspace() ~ 'A1'.isalnum() ~ 'AB'.isupper() ~ 'ab'.islower() ~ 'Ab'.istitle()
'{} {}'.format(1, 'a') ~ '{0}{1}{0}'.format('x', 'y') ~ '{a.b}{c[0]}'.format(a={'b': 1}, c=[2])
'{:>5}|{:<5}|{:^5}|{:05d}|{:+d}|{:,}'.format('a', 'b', 'c', 42, 3, 1234567)
'{:.2f} {:e} {:g} {:%} {:x} {:#x} {:b} {!r}'.format(3.14159, 1234.5, 0.00001, 0.5, 255, 255, 5, 'q')
'{:.3} {:10.3} {} {:.1f}'.format(3.14159, 12345.678, 1.0, 2.25)
'{:{}}'.format('x', 5)
'{{}}'.format()
'{'.format()
'{} {0}'.format(1)
'{x}'.format(y=1)
'{.__class__}'.format(1)
'%s %d %5.2f %x %%' % ('a', 3, 2.5, 255)
'%s' % 'x' ~ '%s' % [1, 2] ~ '%r' % 'q'
'%(a)s-%(b)05d' % {'a': 1, 'b': 42}
'%d' % 2.7
'%d' % 'x'
'%s %s' % ('a',)
'%s' % ('a', 'b')
'%-5s|%5s|%+d|% d|%05d|%.3s' % ('a', 'b', 1, 2, 3, 'abcdef')
'%e %g %G %E' % (12345.678, 0.0001, 1e-10, 1.5)
'%s and %s' | format('a', 'b')
'%(x)s' | format(x=1)
'abc' | format
words | sort | join(',')
words | sort(case_sensitive=true) | join(',')
words | sort(reverse=true) | join(',')
users | sort(attribute='age') | map(attribute='name') | join(',')
users | sort(attribute='age,name') | map(attribute='name') | join(',')
users | map(attribute='name') | map('upper') | list
users | map(attribute='on', default='?') | list
users | map(attribute='nope') | list
users | selectattr('on') | list | length
users | selectattr('age', 'equalto', 5) | map(attribute='name') | list
users | selectattr('age', '>', 4) | map(attribute='name') | list
users | rejectattr('on') | map(attribute='name') | list
users | rejectattr('name', 'in', ['bob']) | list
users | selectattr('on', 'defined') | list | count
nums | select('odd') | list ~ nums | reject('odd') | list ~ nums | select | list
nums | select('divisibleby', 2) | list ~ nums | select('gt', 2) | list
nums | map('string') | list ~ ['1', 'x'] | map('int', default=-1) | list
nums | map('nofilter') | list
nums | select('notest') | list
nums | map | list
nums | sum ~ nums | min ~ nums | max ~ nums | first ~ nums | last ~ nums | length
[] | sum ~ [] | min ~ [] | max ~ [] | first ~ [] | last
users | sum(attribute='age') ~ nums | sum(start=10)
['a'] | sum
words | min ~ words | max ~ words | max(case_sensitive=true)
users | max(attribute='age')
words | unique | list ~ users | unique(attribute='age') | map(attribute='name') | list
words | reverse | list ~ 'abc' | reverse ~ d | reverse | list
d | dictsort ~ d | dictsort(true) ~ d | dictsort(reverse=true)
d | dictsort(by='value')
{'x': 2, 'y': 1} | dictsort(false, 'value')
d | items | list ~ missing | items | list
d | list ~ d | length ~ d | first ~ d | last
'abc' | list ~ 'abc' | first ~ 'abc' | last
nums | batch(2) | list ~ nums | batch(3, 'x') | list
nums | slice(3) | list ~ nums | slice(3, 'x') | list
users | groupby('age') | list | length
multi | indent ~ multi | indent(2, true) ~ multi | indent(width='> ', blank=true)
5 | indent
'a b c d e f g' | truncate(9) ~ 'foo bar baz qux' | truncate(9, true) ~ 'foo bar' | truncate(5)
'foo bar baz qux' | truncate(11, false, '..', 0)
s | wordcount ~ t | trim ~ t | trim(' \\n') ~ s | replace('o', '0') ~ s | replace('l', 'L', 2)
5 | replace('5', 'x') ~ 5 | string + 'a' ~ 5 | upper
html | e ~ html | escape ~ html | forceescape ~ html | striptags ~ html | safe
(html | safe) + '<' ~ (html | e | e) ~ ('<' | e | forceescape)
'<b>' | e | upper ~ ('a' | safe) is escaped ~ 'a' is escaped
'5' | int + 1 ~ ' 12 ' | int ~ '4.7' | int ~ 'x' | int ~ 'x' | int(3) ~ 3.9 | int ~ -3.9 | int
'ff' | int(base=16) ~ '0x1f' | int(0, 16) ~ '0b11' | int(0, 2) ~ '1_000' | int ~ true | int ~ none | int(9)
[] | int(5) ~ '1e3' | int ~ 'inf' | int(2) ~ 'nan' | int(2)
'3.5' | float + 1 ~ 'x' | float ~ 'x' | float(1.5) ~ '1e-5' | float ~ ' 2 ' | float ~ 'inf' | float ~ '1_0.5' | float
2.5 | round ~ 3.5 | round ~ 2.675 | round(2) ~ 42.55 | round(1, 'floor') ~ 42.51 | round(1, 'ceil') ~ 7 | round ~ 1234 | round(-2) ~ 1250.0 | round(-2) ~ 1350 | round(-2)
2.5 | round | int ~ 'x' | abs
-5 | abs ~ -5.5 | abs ~ true | abs
1 | round(method='bad')
tiny ~ ' ' ~ huge ~ ' ' ~ big ~ ' ' ~ 1e15 ~ ' ' ~ 1e16 ~ ' ' ~ 1.0e-4 ~ ' ' ~ 1e-5 ~ ' ' ~ 123456.789e3
mixed | join('|') ~ nums | join ~ users | join(',', attribute='name')
d | tojson ~ mixed | tojson ~ u | tojson ~ html | tojson
d | tojson(indent=2)
nested | tojson(indent=4)
{'b': 1, 'a': [], 'c': {}} | tojson(indent=1, sort_keys=true)
{'b': 1, 'a': 2} | tojson(separators=(',', ':'))
{1: 2, none: 3, true: 4, 1.5: 5} | tojson
(1, 'a') | tojson ~ 'é\\u2028\\x7f\\x01' | tojson ~ 'é😀' | tojson(ensure_ascii=true)
1e100 | tojson ~ 1.0 | tojson ~ 'a"b\\\\c/d\\n' | tojson
missing | tojson
(d.items() | list) | tojson
d.items() | tojson
[missing] | tojson
{(1, 2): 3} | tojson
nums | tojson(indent='--')
range(5) | list ~ range(2, 8, 3) | list ~ range(5, 0, -2) | list ~ range(3) ~ range(1, 9, 2)
range(100001)
range(10**9)
range(5)[1] ~ range(5)[-1] ~ range(5) | length ~ (3 in range(5)) ~ range(5) | last ~ range(0) | first
range(1.5)
range(1, 2, 0)
dict(a=1, b=2) ~ dict({'x': 1}, y=2) ~ dict([('k', 'v')]) ~ dict.fromkeys(['a'], 1)
namespace(a=1).a ~ namespace({'b': 2}).b ~ namespace(a=1)
namespace(_x=1)
namespace(a=1).zz ~ 'ok'
s.__class__
s.__class__.__mro__
s['__class__']
''.__class__.__base__.__subclasses__()
(1).__class__
d.__getitem__
s._private
strftime_now('%d %b %Y') ~ strftime_now('%Y-%m-%d %H:%M:%S %A %j') ~ strftime_now('%B %-d')
raise_exception('planted')
raise_exception(5)
5 is odd ~ 4 is even ~ 6 is divisibleby 3 ~ 6 is divisibleby(4)
s is string ~ n is number ~ f is float ~ n is integer ~ yes is boolean ~ yes is true ~ no is false ~ none is none
yes is number ~ yes is integer ~ d is mapping ~ nums is sequence ~ s is sequence ~ d is sequence ~ nums is iterable ~ 5 is iterable ~ none is iterable
missing is iterable ~ missing is sequence ~ missing is callable ~ missing is none ~ missing is string
s is callable ~ range is callable ~ d.items is callable
'a' is lower ~ 'A' is upper ~ 'a1' is lower ~ '1' is lower
1 is eq 1 ~ 1 is equalto(2) ~ 1 is ne 2 ~ 1 is lt 2 ~ 2 is ge 2 ~ 3 is greaterthan 2 ~ 1 is lessthan 0 ~ 1 is le 1
1 is in [1, 2] ~ 'a' is in 'abc' ~ 5 is not in [1]
1 is sameas 1 ~ none is sameas none ~ true is sameas true ~ 1 is sameas true
'upper' is filter ~ 'nope' is filter ~ 'odd' is test ~ 'nope' is test
n is not none and n is defined
s is string and s or 'x'
not s is string
1 is defined is true
d.a is defined and d.a == 2
s | lower | replace('l', 'L') | trim | length
(1, 2) | list ~ (1, 2) | first ~ (nums, s)
nums.0 ~ nums.1
s.0
n.real ~ f.is_integer() ~ 2.0.is_integer()
(f * 1e308).is_integer() ~ (f * 1e308 - f * 1e308).is_integer() ~ 1e300.is_integer()
{9.22e18: 'same'}[9220000000000000000]
'%5.1f|%-5d|%+d|% d|%05d|%x|%X|%o|%#x|%s|%r|%%|%.2s|%5.1s|' % (f, n, n, n, n, 255, 255, 8, 255, s, s, s, s)
'%(a)s %(b)5s' % {'a': 1, 'b': 'x'} ~ '%ld' % 3 ~ '%i' % 3.9
'{} {}'.format(1, 2) ~ '{1} {0}'.format(1, 2) ~ '{0[a]} {0.real}'.format({'a': 1}) ~ '{k!r:>6}'.format(k='x')
'{:{}}|{:>{w}.{p}f}'.format('x', 3, 2.5, w=8, p=2)
'{} {0}'.format(1)
'{0} {}'.format(1)
'{0.real} {}'.format(5)
'{:{:{}}}'.format(1, 2, 3)
'{!x}'.format(1)
'{!r'.format(1)
'{a[b}'.format(a={'b': 1})
'{:<<5}|{:^^7}|{:=+6}|{:é>4}'.format('x', 'y', 3, 4)
cycler('a', 'b').next() ~ joiner(',')() ~ 'x'
[1, 2, 3,] ~ {'a': 1,}
'a' ~ ('b' if no)
nums | length > 2 and nums | first == 3
(nums | length) ~ nums|length
-5 + +3
- - 5
1 if 0 else 2 if 0 else 3
[x for x in nums]
lambda: 1
nums[0] = 1
a b
1 +
'unclosed
{{ 1 }}
s(1)
5()
s.upper
foo.bar.baz
d.a.b
none.x ~ none['x'] ~ 5.x
n[0]
n[0:1]
d[0:1]
d[[1]]
d[(1, [2])]
{[1]: 2}
'a' % 5
'' % missing
'%s' % missing
'%s' % none
'%5s|' % missing
missing ~ 'x'
[missing]
missing | upper ~ missing | trim ~ missing | length ~ missing | list ~ missing | join ~ missing | first ~ missing | last
missing | int
missing | float
missing | abs
missing | sort ~ missing | map('upper') | list ~ missing | sum ~ missing | reverse | list ~ missing | replace('a', 'b') ~ missing | title
missing | dictsort
missing | indent
missing | round
none | upper ~ none | trim ~ none | string ~ none | replace('N', 'n')
none | length
none | list
none | join
none | sort
none | first
none | map('upper') | list
5 | length
5 | list
5 | map('upper') | list
true | string ~ 1.0 | string ~ [1] | string
(nums | map('string')) is iterable ~ (nums | map('string')) is sequence ~ (nums | select('odd') | first)
(nums | select('odd')) | length
(nums | select('odd'))[0]
(nums | select('odd')) | last
(nums | select('odd')) | reverse
[nums | map('abs'), 1] | length
d == {'a': 2, 'b': 1, 'C': [1, 2]}
d.keys() == {'C': 1, 'a': 1, 'b': 2}.keys()
d.items() == d.items()
range(3) == range(3) ~ range(0) == range(2, 1)
loop
loop is defined
self is defined
varargs is defined
x is defined
caller is defined
messages ~ tools ~ documents ~ add_generation_prompt ~ bos_token ~ eos_token
9223372036854775807
-9223372036854775807
07
1.
.5
1..2
'a'.b.c
"double \\"quoted\\""
nums | join(separator=',')
s | trim(foo=1)
s | replace('a')
s | default(1, 2, 3)
s.upper(1)
s.replace('a')
s.split(maxsplit=1) ~ s.split(sep=',', maxsplit=0)
s.strip(chars='H')
d.get(key='a')
s | attr('upper') is callable ~ d | attr('a') is defined
nums | attr('__class__')
'%c' % 65
s.encode()
5 in nums and 3 in nums
none is none is none
'a' < 'b' < 'c' and 1 <= 1.0 == true
'abc'[-2:] ~ 'abc'[:1] ~ 'abc'[1:100] ~ 'abc'[-100:1]
'abc'[::0]
s['a':]
[[1, 2], [3, 4]] | map('join', '-') | join('+')
[[1, 2], [3, 4]] | map(attribute=1) | list ~ [[1, 2]] | map('first') | list
[{'a': {'b': 1}}] | map(attribute='a.b') | list ~ [{'a': [5]}] | map(attribute='a.0') | list
['x', 'y'] | map('replace', 'x', 'z') | list
[3, 1] | sort | first ~ ([3, 1] | sort)[0]
(1, 'b') < (1, 'c') ~ [1] == [1.0] ~ [[1], 2] == [[1], 2]
[1, 'a'] | sort
['a', 1] | max
[none] | sort
[1, 'a', none] | unique | list ~ [1, 1.0, true] | unique | list
[[1], [1]] | unique | list
'x' * 0 ~ 'x' * -1 ~ [1] * 0
[0] * 3 == [0, 0, 0]
1e308 * 10 ~ -1e308 * 10
0.0 == -0.0 ~ -0.0
5 // 0.3 ~ -5 % 0.3 ~ 5.5 % -2
2 ** 0.5 ~ 4 ** 0.5 ~ 0 ** 0 ~ 2.0 ** 3
'é' | urlencode ~ 'a b/c?d' | urlencode
'a' | center(5) ~ '|' ~ 'abc' | center(2)
'ab' | string | list | join('-')
"a\\
b"
'tab\\there' ~ "nl\\nhere"
""".strip("\n").split("\n")


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if e.strip()])
def test_expression(expression: str) -> None:
    source = "{{ " + expression.replace("\\\\", "\\") + " }}"
    expected, actual = oracle(source, **VARIABLES), ours(source, **VARIABLES)
    if actual[0] == "error" and UNSUPPORTED in actual[1]:
        return
    if expected[0] == "ok" and " at 0x" in expected[1]:
        assert actual[0] == "error", (source, expected, actual)
        return
    assert actual[0] == expected[0], (source, expected, actual)
    if expected[0] == "ok":
        assert actual[1] == expected[1], source


def test_most_of_the_corpus_is_supported() -> None:
    """Naming an unsupported construct is allowed, but only for rarities."""
    refused = [
        e
        for e in EXPRESSIONS
        if UNSUPPORTED in ours("{{ " + e.replace("\\\\", "\\") + " }}", **VARIABLES)[1]
        and oracle("{{ " + e.replace("\\\\", "\\") + " }}", **VARIABLES)[0] == "ok"
    ]
    assert len(refused) <= 12, refused
