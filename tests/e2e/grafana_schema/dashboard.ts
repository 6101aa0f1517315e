// The dashboards as Grafana's own types have them (@grafana/schema), with the options of the four panels that we use
// instead of "any object". make.py turns this into dashboard.schema.json.
import { Dashboard, DataSourceRef, FieldConfig, FieldConfigSource, Panel } from '@grafana/schema';
import { Options as StatOptions } from '@panels/stat/panelcfg/x/StatPanelCfg_types.gen';
import { Options as TimeOptions, FieldConfig as TimeField } from '@panels/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import { Options as HeatOptions, FieldConfig as HeatField } from '@panels/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import { Options as BarOptions } from '@panels/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';

// Of the Prometheus data source; @grafana/schema leaves targets to the plugins.
interface Target {
  refId: string;
  expr: string;
  legendFormat: string;
  datasource: DataSourceRef;
  format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
}

type Field<C> = Omit<FieldConfigSource, 'defaults'> & { defaults: Omit<FieldConfig, 'custom'> & { custom?: C } };

type Typed<T, O, C> = Omit<Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: T;
  options: Partial<O>; // Grafana fills in its defaults
  fieldConfig: Field<C>;
  targets: Target[];
};

type GearPanel =
  | Typed<'stat', StatOptions, never>
  | Typed<'bargauge', BarOptions, never>
  | Typed<'timeseries', TimeOptions, TimeField>
  | Typed<'heatmap', HeatOptions, HeatField>;

export type GearDashboard = Omit<Dashboard, 'panels'> & { panels: GearPanel[] };
