/** Charts as SVG, written by hand: axes, a legend, lines or grouped bars, and the paper's points among ours. */

export interface Series {
  name: string;
  points: [number, number][];
  /** Whose numbers: the paper's are hollow and dashed. */
  from: 'here' | 'paper';
  /** Colours go by this, so that a mode has the same one in every chart. */
  colour?: string;
  /** A line without its points, for many of them. */
  plain?: boolean;
}

export interface Chart {
  /** The file's name, without its extension. */
  name: string;
  kind: 'line' | 'bar';
  title: string;
  xLabel: string;
  yLabel: string;
  /** Where the x axis is labelled, and with what; null: by numbers. */
  xTicks: { at: number; label: string }[] | null;
  series: Series[];
}

export const colours: Record<string, string> = {
  'pre-copy': '#c0392b',
  'post-copy': '#2471a3',
  scatter: '#1e8449',
  reach: '#7f8c8d',
  none: '#7d6608',
};
const others = ['#6c3483', '#b9770e', '#117864', '#1b2631'];

const width = 720;
const height = 420;
const margin = { left: 70, right: 210, top: 44, bottom: 56 };
const plotWidth = width - margin.left - margin.right;
const plotHeight = height - margin.top - margin.bottom;

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}

/** 1, 2 or 5 times a power of ten: about five to an axis. */
function stepFor(span: number): number {
  const raw = span / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const factor = [1, 2, 5, 10].find((candidate) => candidate * power >= raw) ?? 10;
  return factor * power;
}

function ticks(from: number, to: number): number[] {
  const step = stepFor(to - from);
  const list: number[] = [];
  for (let value = Math.ceil(from / step) * step; value <= to + step * 1e-9; value += step) list.push(value);
  return list;
}

function number(value: number): string {
  return Number(value.toPrecision(6)).toString();
}

const at = (value: number): string => value.toFixed(1);

interface Scale {
  x(value: number): number;
  y(value: number): number;
}

function colourOf(series: Series, index: number): string {
  return series.colour ?? others[index % others.length] ?? '#000';
}

function lineMarks(series: Series, index: number, scale: Scale): string {
  const colour = colourOf(series, index);
  const dash = series.from === 'paper' ? ' stroke-dasharray="5 4"' : '';
  const path = series.points.map(([x, y]) => `${at(scale.x(x))},${at(scale.y(y))}`).join(' ');
  const line = `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"${dash}/>`;
  if (series.plain) return line;
  const fill = series.from === 'paper' ? '#fff' : colour;
  const dots = series.points.map(
    ([x, y]) =>
      `<circle cx="${at(scale.x(x))}" cy="${at(scale.y(y))}" r="4" fill="${fill}" stroke="${colour}" stroke-width="1.5"/>`,
  );
  return line + dots.join('');
}

function barMarks(series: Series, index: number, all: readonly Series[], scale: Scale): string {
  const colour = colourOf(series, index);
  const barWidth = Math.min(26, (plotWidth / (all[0]?.points.length || 1) / (all.length + 1)) | 0);
  const offset = (index - (all.length - 1) / 2) * barWidth;
  const look =
    series.from === 'paper'
      ? `fill="#fff" stroke="${colour}" stroke-dasharray="3 2"`
      : `fill="${colour}" stroke="${colour}"`;
  return series.points
    .map(([x, y]) => {
      const left = at(scale.x(x) + offset - barWidth / 2);
      const top = scale.y(y);
      return `<rect x="${left}" y="${at(top)}" width="${barWidth - 2}" height="${at(scale.y(0) - top)}" ${look}/>`;
    })
    .join('');
}

function legend(series: readonly Series[]): string {
  return series
    .map((one, index) => {
      const y = margin.top + 10 + index * 20;
      const x = width - margin.right + 14;
      const colour = colourOf(one, index);
      const dash = one.from === 'paper' ? ' stroke-dasharray="5 4"' : '';
      return (
        `<line x1="${x}" x2="${x + 22}" y1="${y}" y2="${y}" stroke="${colour}" stroke-width="3"${dash}/>` +
        `<text x="${x + 28}" y="${y + 4}">${escaped(one.name)}</text>`
      );
    })
    .join('');
}

function axes(chart: Chart, scale: Scale, xs: number[], top: number): string {
  const base = margin.top + plotHeight;
  const parts: string[] = [];
  for (const value of ticks(0, top)) {
    const y = at(scale.y(value));
    parts.push(
      `<line x1="${margin.left}" x2="${margin.left + plotWidth}" y1="${y}" y2="${y}" stroke="#ddd"/>`,
      `<text x="${margin.left - 8}" y="${(Number(y) + 4).toFixed(1)}" text-anchor="end">${number(value)}</text>`,
    );
  }
  const [from, to] = [Math.min(...xs), Math.max(...xs)];
  const xTicks = chart.xTicks ?? ticks(from, to).map((value) => ({ at: value, label: number(value) }));
  for (const tick of xTicks) {
    parts.push(
      `<text x="${at(scale.x(tick.at))}" y="${base + 18}" text-anchor="middle">${escaped(tick.label)}</text>`,
    );
  }
  parts.push(
    `<path d="M${margin.left},${margin.top} V${base} H${margin.left + plotWidth}" fill="none" stroke="#333"/>`,
    `<text x="${margin.left + plotWidth / 2}" y="${height - 14}" text-anchor="middle">${escaped(chart.xLabel)}</text>`,
    `<text transform="translate(18,${margin.top + plotHeight / 2}) rotate(-90)" text-anchor="middle">${escaped(chart.yLabel)}</text>`,
    `<text x="${margin.left}" y="24" font-size="15" font-weight="bold">${escaped(chart.title)}</text>`,
  );
  return parts.join('');
}

/** The whole file. Series without points are left out. */
export function renderChart(chart: Chart): string {
  const series = chart.series.filter(({ points }) => points.length > 0);
  const points = series.flatMap((one) => one.points);
  const xs = [...points.map(([x]) => x), ...(chart.xTicks ?? []).map((tick) => tick.at)];
  if (xs.length === 0) xs.push(0, 1);
  const highest = Math.max(...points.map(([, y]) => y), Number.MIN_VALUE);
  const top = stepFor(highest) * Math.ceil((highest * 1.02) / stepFor(highest));
  // Room on both sides for what is drawn around a position.
  const pad = chart.kind === 'bar' ? 0.6 : (Math.max(...xs) - Math.min(...xs) || 1) * 0.03;
  const [left, right] = [Math.min(...xs) - pad, Math.max(...xs) + pad];
  const scale: Scale = {
    x: (value) => margin.left + ((value - left) / (right - left)) * plotWidth,
    y: (value) => margin.top + plotHeight - (value / top) * plotHeight,
  };
  const marks = series.map((one, index) =>
    chart.kind === 'bar' ? barMarks(one, index, series, scale) : lineMarks(one, index, scale),
  );
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="sans-serif" font-size="12" fill="#222">\n` +
    `<rect width="${width}" height="${height}" fill="#fff"/>\n` +
    [axes(chart, scale, xs, top), ...marks, legend(series)].join('\n') +
    '\n</svg>\n'
  );
}
