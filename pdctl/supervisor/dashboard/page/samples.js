// The samples that charts show, by column. The newest come with every update; a longer time is asked for.

/** Samples of a time. A value is null if it is unknown. */
export class Samples {
  constructor(span) {
    this.span = span;
    this.columns = { at: [] };
  }

  clear() {
    this.columns = { at: [] };
  }

  /** Add newer samples, and drop those that are too old. */
  add(table) {
    const before = this.columns.at.length;
    const count = table.at.length;
    for (const name of new Set([...Object.keys(this.columns), ...Object.keys(table)])) {
      const column = (this.columns[name] ??= new Array(before).fill(null));
      column.push(...(table[name] ?? new Array(count).fill(null)));
    }
    const from = this.columns.at.findIndex((at) => at >= this.columns.at.at(-1) - this.span);
    if (from > 0) for (const column of Object.values(this.columns)) column.splice(0, from);
  }

  column(name) {
    return this.columns[name] ?? new Array(this.columns.at.length).fill(null);
  }

  /** The engines that have had this column, in the order in which they came. */
  engines(column) {
    const ending = `/${column}`;
    return Object.keys(this.columns)
      .filter((name) => name.endsWith(ending))
      .map((name) => name.slice(0, -ending.length));
  }

  /** The sum of a column over all engines; null where no engine answered. */
  sum(column) {
    const columns = this.engines(column).map((engine) => this.column(`${engine}/${column}`));
    return this.columns.at.map((_, place) => {
      const known = columns.map((values) => values[place]).filter((value) => value !== null);
      return known.length ? known.reduce((total, value) => total + value, 0) : null;
    });
  }
}
