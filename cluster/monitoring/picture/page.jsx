// Draws the dashboard with Grafana's own components, laid out as Grafana does.
import { createRoot } from 'react-dom/client';
import {
  ThemeContext,
  applyFieldOverrides,
  createTheme,
  dateTime,
  FieldType,
  getFieldDisplayValues,
  Registry,
  toDataFrame,
} from '@grafana/data';
import { initPluginTranslations } from '@grafana/i18n';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';

const CELL = 30;
const GAP = 8;
const COLUMNS = 24;
const WIDTH = 1600;
const theme = createTheme({ colors: { mode: 'dark' } });
const answers = window.ANSWERS;
const { dashboard } = answers;
const rendering = { theme, timeZone: 'utc', replaceVariables: (text) => text };
const column = (WIDTH - GAP * (COLUMNS + 1)) / COLUMNS;
const timeRange = {
  from: dateTime(answers.from * 1000),
  to: dateTime(answers.to * 1000),
  raw: { from: 'now-1h', to: 'now' },
};

function place({ x, y, w, h }) {
  return {
    position: 'absolute',
    left: GAP + x * (column + GAP),
    top: GAP + y * (CELL + GAP),
    width: w * column + (w - 1) * GAP,
    height: h * CELL + (h - 1) * GAP,
  };
}

// Grafana registers what fields can be told; here it is what this dashboard tells them.
function registry({ defaults, overrides }) {
  const told = overrides.flatMap(({ properties }) => properties.map(({ id }) => id));
  const custom = Object.keys(defaults.custom ?? {});
  const item = (path, isCustom) => ({
    id: isCustom ? `custom.${path}` : path,
    path,
    isCustom,
    process: (value) => value,
    shouldApply: () => true,
  });
  const plain = new Set([...Object.keys(defaults).filter((key) => key !== 'custom'), ...told]);
  const items = [...[...plain].map((path) => item(path, false)), ...custom.map((path) => item(path, true))];
  return new Registry(() => items);
}

function frames(panel) {
  const data = answers.series[panel.id].map(({ query, legend, values }) =>
    toDataFrame({
      refId: query,
      fields: [
        { name: 'Time', type: FieldType.time, values: values.map(([time]) => time * 1000) },
        {
          name: 'Value',
          type: FieldType.number,
          values: values.map(([, value]) => value),
          config: { displayNameFromDS: legend },
        },
      ],
    })
  );
  const { fieldConfig } = panel;
  return applyFieldOverrides({ data, fieldConfig, fieldConfigRegistry: registry(fieldConfig), ...rendering });
}

function Stat({ panel, data, width, height }) {
  const [shown] = getFieldDisplayValues({
    data,
    fieldConfig: panel.fieldConfig,
    reduceOptions: panel.options.reduceOptions,
    sparkline: panel.options.graphMode !== 'none',
    ...rendering,
  });
  const { colorMode, graphMode, textMode } = panel.options;
  return <BigValue {...{ theme, width, height, colorMode, graphMode, textMode }} value={shown.display} sparkline={shown.sparkline} />;
}

function Graph({ panel, data, width, height }) {
  if (!data.length) {
    return <div style={{ textAlign: 'center', paddingTop: height / 2 - 20 }}>No data</div>;
  }
  return <TimeSeries {...{ width, height, timeRange }} frames={data} timeZone="utc" legend={panel.options.legend} options={panel.options} />;
}

function Panel({ panel }) {
  const style = place(panel.gridPos);
  if (panel.type === 'row') {
    return <div style={{ ...style, font: '500 16px Inter', paddingTop: 6 }}>⌄ {panel.title}</div>;
  }
  const Inner = panel.type === 'stat' ? Stat : Graph;
  const data = frames(panel);
  return (
    <div style={style}>
      <PanelChrome title={panel.title} width={style.width} height={style.height}>
        {(width, height) => <Inner {...{ panel, data, width, height }} />}
      </PanelChrome>
    </div>
  );
}

initPluginTranslations('page').then(() =>
  createRoot(document.body.appendChild(document.createElement('div'))).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles hackNoBackdropBlur={true} isExtensionSidebarOpen={false} />
      {dashboard.panels.map((panel) => (
        <Panel key={panel.id} panel={panel} />
      ))}
    </ThemeContext.Provider>
  )
);
Object.assign(document.body.style, {
  margin: 0,
  background: theme.colors.background.canvas,
  color: theme.colors.text.primary,
  font: '14px Inter',
});
