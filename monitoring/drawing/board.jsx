// One dashboard, drawn with Grafana's own components from query results (draw.py writes both files).
import React from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext, toDataFrame } from '@grafana/data';
import { BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import board from './board.json';
import answers from './answers.json';

const WIDTH = 1500, COLUMN = WIDTH / 24, ROW = 34;
const theme = createTheme({ colors: { mode: 'light' } });
const [from, to] = [answers.start, answers.end].map((second) => dateTime(second * 1000));
const range = { from, to, raw: { from, to } };

function framesOf(panel) {
  const { unit, min, custom, thresholds } = panel.fieldConfig.defaults;
  const drawn = { axisPlacement: 'auto', scaleDistribution: { type: 'linear' }, pointSize: 4, ...custom, hideFrom: {} };
  const series = panel.targets.flatMap(({ expr, legendFormat }) =>
    answers.by_query[expr].map((found) => ({ ...found, name: legendOf(legendFormat, found.metric) })));
  return series.map(({ name, values }, seriesIndex) => {
    const number = {
      name, type: FieldType.number, values: values.map(([, value]) => (Number.isFinite(+value) ? +value : null)),
      config: { displayName: name, unit, min, thresholds, custom: drawn, color: { mode: 'palette-classic' } },
    };
    const time = { name: 'time', type: FieldType.time, values: values.map(([second]) => second * 1000) };
    const frame = toDataFrame({ name, fields: [time, number] });
    for (const field of frame.fields) {
      field.state = { ...field.state, seriesIndex };
      field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
    }
    return frame;
  });
}

function legendOf(legend, labels) {
  return legend.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? '?');
}

function Stat({ frame, width, height }) {
  const [time, number] = frame.fields;
  const last = number.values.filter((value) => value !== null).at(-1);
  return <BigValue width={width} height={height} theme={theme} value={number.display(last)}
    colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.Area} sparkline={{ x: time, y: number }} />;
}

function Content({ panel, width, height }) {
  const frames = framesOf(panel);
  if (!frames.length) return <div>No data</div>;
  if (panel.type === 'stat') return <Stat frame={frames[0]} width={width} height={height} />;
  return <TimeSeries frames={frames} structureRev={1} timeRange={range} timeZone="utc" width={width} height={height}
    legend={panel.options.legend} options={panel.options} />;
}

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * COLUMN + 4, top: y * ROW + 4 };
  if (panel.type === 'row') return <div style={{ ...place, fontSize: 16, paddingTop: 6 }}>{panel.title}</div>;
  return <div style={place}>
    <PanelChrome width={w * COLUMN - 8} height={h * ROW - 8} title={panel.title} description={panel.description}>
      {(width, height) => <Content panel={panel} width={width} height={height} />}
    </PanelChrome>
  </div>;
}

class Guard extends React.Component {
  state = {};
  static getDerivedStateFromError(error) { return { error }; }
  render() { return this.state.error ? <pre>{String(this.state.error.stack)}</pre> : this.props.children; }
}

const rows = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
const canvas = { position: 'relative', width: WIDTH, height: rows * ROW, background: theme.colors.background.canvas };
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={canvas}>{board.panels.map((panel) => <Guard key={panel.id}><Panel panel={panel} /></Guard>)}</div>
  </ThemeContext.Provider>,
);
