"""The section of what a reader must know beside the figures."""

from collections.abc import Iterator

from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.reporting import facts
from jaxprog.reporting.page.markup import render
from jaxprog.reporting.parts import Column, Heading, Part, Table
from jaxprog.reporting.rundir import RunFiles

# Incidents that a page lists; the log has them all.
_MAX_INCIDENTS = 60
_INCIDENTS = (
  Column('time', lambda x: x.get('time') or '-', left=True),
  Column('kind', lambda x: x['kind'], left=True),
  Column('stage', lambda x: x.get('stage') or '-', left=True),
  Column('step', lambda x: '-' if x.get('step') is None else f'{x["step"]:,}'),
  Column('message', lambda x: x.get('message') or '-', left=True),
)


def notes(run: RunFiles) -> Iterator[Part]:
  """Yields notes and incidents; the page has a table of the last of these."""
  yield facts.notes(run) or 'Nothing to note.'
  if run.incidents is None:
    return
  yield Heading('Incidents')
  if not run.incidents:
    yield 'None were recorded.'
    return
  yield incidents_lib.summarise(run.incidents)
  last, count = run.incidents[-_MAX_INCIDENTS:], len(run.incidents)
  said = f'The last {len(last)} of {count:,}; incidents.jsonl has all of them'
  yield render(Table(_INCIDENTS, last, said))
